#!/usr/bin/env bash
# What a GPU computes and how fast, beside the CPU: the tests marked `cuda` and the GPU rows of benchmarks/data.py, in one table.
#   tools/gpu_check.sh             on a machine with a GPU, torch, numba, scipy and h5py (Python 3.12; PYTHON=… names another interpreter)
#   tools/gpu_check.sh --collect   beforehand, where there is a network: the other packages as wheels in build/gpu_wheels
set -euo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-python3} wheels=build/gpu_wheels site=build/gpu_site
packages=(dipy fastcore fsspec iniconfig lazy-loader lightning-fabric lightning-utilities nibabel packaging pluggy pygments pytest tomlkit tqdm trx-python)

if [ "${1:-}" = --collect ]; then
    rm -rf $wheels
    systems=(); for n in 17 24 27 28; do systems+=(--platform "manylinux_2_${n}_x86_64"); done
    "$python" -m pip download --quiet --no-deps --only-binary=:all: --python-version 3.12 --implementation cp "${systems[@]}" \
        --platform manylinux2014_x86_64 --constraint constraints.txt --dest $wheels "${packages[@]}"
    size=$(du -sm $wheels | cut -f1)
    echo "$wheels: $(ls $wheels | wc -l) wheels, $size MB"
    [ "$size" -lt 60 ]; exit
fi

there=$("$python" -c 'import torch; print(torch.cuda.is_available())') || { echo "PYTHON=… names an interpreter that has torch"; exit 1; }
[ "$there" = True ] || { echo "no GPU that torch could use: nothing is checked"; exit 0; }

rm -rf $site; mkdir -p $site/dwiml_nb-0.dist-info; shopt -s nullglob
for wheel in $wheels/*.whl; do "$python" -m zipfile -e "$wheel" $site; done
printf 'Metadata-Version: 2.1\nName: dwiml_nb\nVersion: %s\n' "$(sed -n 's/^version = //p' settings.ini)" > $site/dwiml_nb-0.dist-info/METADATA
export PYTHONPATH=$PWD/$site:$PWD
"$python" -c 'import dipy, fastcore, nibabel, pytest, tqdm, trx' || { echo "where there is a network, run: tools/gpu_check.sh --collect"; exit 1; }
exec "$python" tools/gpu_table.py
