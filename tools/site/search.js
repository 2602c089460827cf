// Search without a network: the words of all pages lie in search_words.js, which is loaded when somebody goes to the field.
(() => {
  const box = document.querySelector(".search"), field = box.querySelector("input"), panel = box.querySelector(".found")
  const top = box.dataset.top, MOST = 30, PAGE = 0, NAME = 1
  let places = null, chosen = -1

  const prepare = () => {
    places = SITE_WORDS.places.map(([page, anchor, kind, head, text]) => {
      const [address, title] = SITE_WORDS.pages[page]
      return {kind, head, title, text, href: `${top}/${address}${anchor ? "#" + anchor : ""}`,
              inHead: head.toLowerCase(), inTitle: title.toLowerCase(), inText: text.toLowerCase()}
    })
    look()
  }
  const load = () => {
    if (box.querySelector("script")) return
    const script = document.createElement("script")
    script.src = `${top}/search_words.js`
    script.onload = prepare
    script.onerror = () => say("The words of this site are not beside its pages (search_words.js).")
    box.append(script)
  }

  // A word counts most in a name or a heading, then in the title, then in what is said; most of all where a word begins.
  const begins = (text, word) => {
    for (let i = text.indexOf(word); i >= 0; i = text.indexOf(word, i + 1))
      if (i === 0 || !/[\p{L}\p{N}]/u.test(text[i - 1])) return true
    return false
  }
  const worth = (text, word, most) => !text.includes(word) ? 0 : begins(text, word) ? most : most/2
  const score = (place, words, whole) => {
    let sum = 0
    for (const word of words) {
      const one = worth(place.inHead, word, 20) + worth(place.inTitle, word, 5) + worth(place.inText, word, 4)
      if (!one) return 0
      sum += one
    }
    if (place.inHead === whole || place.inHead.replaceAll("_", " ") === whole) sum += 100
    else if (place.inHead.startsWith(whole)) sum += 30
    if (place.inHead.includes(whole)) sum += 10*whole.length/place.inHead.length
    return sum + (place.kind === PAGE ? 4 : place.kind === NAME ? 3 : 0)
  }

  const pairs = text => new Set([...text].slice(1).map((c, i) => text[i] + c))
  const nearest = word => {
    let best = ["", .4]
    const own = pairs(word)
    for (const {head, inHead, kind} of places) {
      if (kind !== NAME) continue
      const other = pairs(inHead), shared = [...own].filter(p => other.has(p)).length
      const like = 2*shared/(own.size + other.size)
      if (like > best[1]) best = [head, like]
    }
    return best[0]
  }

  const say = text => {
    const p = document.createElement("p")
    p.textContent = text
    panel.replaceChildren(p)
    show()
    return p
  }
  const marked = (text, words) => {  // nodes, with the words in <mark>
    const pattern = new RegExp(words.map(w => w.replace(/[.*+?^${}()|[\]\\]/g, "\\$&")).join("|"), "giu")
    const nodes = []
    let from = 0
    for (const {0: hit, index} of text.matchAll(pattern)) {
      const mark = document.createElement("mark")
      mark.textContent = hit
      nodes.push(text.slice(from, index), mark)
      from = index + hit.length
    }
    return [...nodes, text.slice(from)]
  }
  const around = (place, words) => {  // what is said where the first word stands
    const at = Math.max(0, Math.min(...words.map(w => place.inText.indexOf(w)).filter(i => i >= 0), 1e9))
    const from = at === 1e9 || at < 60 ? 0 : place.text.indexOf(" ", at - 50) + 1
    const rest = place.text.slice(from), end = rest.length > 130 ? rest.lastIndexOf(" ", 130) : rest.length
    return (from ? "… " : "") + rest.slice(0, end) + (end < rest.length ? " …" : "")
  }
  const element = (tag, kind, ...nodes) => {
    const made = document.createElement(tag)
    made.className = kind
    made.append(...nodes)
    return made
  }

  const look = () => {
    const whole = field.value.trim().toLowerCase().replace(/\(\)$/, "")
    chosen = -1
    field.removeAttribute("aria-activedescendant")
    if (!places || !whole) return close()
    const words = [...new Set(whole.split(/\s+/))]
    const found = places.map(place => [score(place, words, whole), place]).filter(([s]) => s > 0)
    found.sort(([a, p], [b, q]) => b - a || p.head.length - q.head.length)
    if (!found.length) {
      const unknown = words.find(w => !places.some(p => p.inHead.includes(w) || p.inText.includes(w) || p.inTitle.includes(w)))
      const other = unknown && nearest(unknown)
      const p = say(unknown ? `Nothing here says “${unknown}”.` : "No place has all of these words.")
      if (other) {
        const button = element("button", "", other)
        button.type = "button"
        button.onclick = () => { field.value = other; field.focus(); look() }
        p.append(" Did you mean ", button, "?")
      }
      return
    }
    panel.replaceChildren(...found.slice(0, MOST).map(([, place], i) => {
      const head = element(place.kind === NAME ? "code" : "b", "", ...marked(place.head, words))
      const where = place.kind === PAGE ? "page" : place.title
      const link = element("a", "", element("span", "head", head, element("small", "", where)),
                           element("span", "said", ...marked(around(place, words), words)))
      Object.assign(link, {href: place.href, id: `search-found-${i}`, tabIndex: -1})
      link.setAttribute("role", "option")
      return link
    }), ...found.length > MOST ? [element("p", "", `and ${found.length - MOST} more: another word tells them apart`)] : [])
    panel.scrollTop = 0
    show()
  }

  const show = () => {
    panel.hidden = false
    field.setAttribute("aria-expanded", "true")
    place()
  }
  const close = () => {
    panel.hidden = true
    field.setAttribute("aria-expanded", "false")
  }
  const place = () => {  // under the field; the page's list of pages would cut what is wider than itself
    if (panel.hidden) return
    const {left, bottom} = field.getBoundingClientRect()
    panel.style.left = `${Math.max(8, Math.min(left, innerWidth - panel.offsetWidth - 8))}px`
    panel.style.top = `${bottom + 4}px`
    panel.style.maxHeight = `${Math.max(160, innerHeight - bottom - 20)}px`
  }
  const choose = step => {
    const links = [...panel.querySelectorAll("a")]
    if (!links.length) return
    links[chosen]?.setAttribute("aria-selected", "false")
    chosen = (chosen + step + links.length + (chosen < 0 && step < 0)) % links.length
    links[chosen].setAttribute("aria-selected", "true")
    links[chosen].scrollIntoView({block: "nearest"})
    field.setAttribute("aria-activedescendant", links[chosen].id)
  }

  field.onfocus = () => { load(); look() }
  field.oninput = look
  field.onkeydown = event => {
    if (event.key === "ArrowDown" || event.key === "ArrowUp") choose(event.key === "ArrowDown" ? 1 : -1)
    else if (event.key === "Enter") (panel.querySelectorAll("a")[Math.max(0, chosen)])?.click()
    else if (event.key === "Escape") { field.value = ""; close(); field.blur() }
    else return
    event.preventDefault()
  }
  box.onsubmit = event => event.preventDefault()
  panel.onclick = event => { if (event.target.closest("a")) close() }
  document.addEventListener("pointerdown", event => { if (!box.contains(event.target)) close() })
  document.addEventListener("keydown", event => {
    const writing = event.target.closest?.("input, textarea, select, [contenteditable]")
    if (event.key !== "/" || writing || event.ctrlKey || event.metaKey || event.altKey) return
    event.preventDefault()
    field.focus()
    field.select()
  })
  addEventListener("scroll", place, {passive: true})
  addEventListener("resize", place)
  box.hidden = false
})()
