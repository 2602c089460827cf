#!/usr/bin/env bash
# Name, and where it is allowed install, what the tests that draw need from the system: a browser and software Vulkan.
set -euo pipefail
missing=()
command -v chromium chromium-browser google-chrome > /dev/null || missing+=(chromium)
[[ $(ldconfig -p) == *libvulkan.so.1* ]] || missing+=(libvulkan1)
compgen -G '/usr/share/vulkan/icd.d/lvp_icd*' > /dev/null || missing+=(mesa-vulkan-drivers)
[ ${#missing[@]} -eq 0 ] && exit 0

echo "missing system packages: ${missing[*]}"
if ! command -v apt-get > /dev/null; then echo "install them to run the browser and FURY tests"; exit 0; fi
sudo=(); [ "$(id -u)" -eq 0 ] || sudo=(sudo -n)
if [ "$(id -u)" -ne 0 ] && ! sudo -n true 2> /dev/null; then echo "to run the browser and FURY tests: sudo apt install ${missing[*]}"; exit 0; fi
export DEBIAN_FRONTEND=noninteractive
"${sudo[@]}" apt-get update -qq
"${sudo[@]}" apt-get install -y -qq --no-install-recommends "${missing[@]}" > /dev/null
