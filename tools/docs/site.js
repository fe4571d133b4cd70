// Menu, colour scheme, anchors and search. Works from file://, so the index is a script and not fetched.
const root = document.documentElement, find = s => document.querySelector(s)

find('#menu').onclick = () => find('#menu').setAttribute('aria-expanded', find('#pages').classList.toggle('open'))

find('#scheme').onclick = () => {
  const dark = root.style.colorScheme ? root.style.colorScheme === 'dark' : matchMedia('(prefers-color-scheme: dark)').matches
  root.style.colorScheme = dark ? 'light' : 'dark'
  try { localStorage.setItem('scheme', root.style.colorScheme) } catch (e) {}
}

for (const h of document.querySelectorAll('main :is(h2, h3, h4)')) { // the name of an API entry stands on the box around it
  const a = Object.assign(document.createElement('a'), {className: 'anchor', href: '#' + (h.id || h.parentElement.id), textContent: '#'})
  a.setAttribute('aria-label', 'Link to this section')
  h.append(' ', a)
}

const box = find('#search input'), list = find('#search ol')

function load(then) {
  if (window.SEARCH) return then()
  const script = Object.assign(document.createElement('script'), {src: 'search.js', onload: then})
  document.head.append(script)
}

// Every word must occur. A word in a section's title counts more than one in its text, a whole word more than a part.
function search(text) {
  const words = text.toLowerCase().split(/\s+/).filter(Boolean), hits = []
  if (!words.length) return hits
  for (const s of SEARCH) {
    const title = s.title.toLowerCase(), body = s.text.toLowerCase()
    let score = 0
    for (const w of words) {
      const whole = new RegExp('(^|[^\\w])' + w.replace(/[^\w]/g, '\\$&') + '($|[^\\w])')
      const here = (title.includes(w) ? 10 : 0) + (whole.test(title) ? 20 : 0) + (body.includes(w) ? 1 : 0) + (whole.test(body) ? 3 : 0)
      score = here && score >= 0 ? score + here : -1
      if (score < 0) break
    }
    if (score > 0) hits.push({...s, score, at: Math.max(0, body.indexOf(words[0]))})
  }
  return hits.sort((a, b) => b.score - a.score).slice(0, 12)
}

function marked(text, words) {
  const span = document.createElement('span')
  for (const part of text.split(new RegExp('(' + words.map(w => w.replace(/[^\w]/g, '\\$&')).join('|') + ')', 'i')))
    span.append(words.includes(part.toLowerCase()) ? Object.assign(document.createElement('mark'), {textContent: part}) : part)
  return span
}

function show() {
  const words = box.value.toLowerCase().split(/\s+/).filter(Boolean), hits = search(box.value)
  list.replaceChildren(...hits.map(hit => {
    const a = Object.assign(document.createElement('a'), {href: hit.url}), from = Math.max(0, hit.at - 40)
    const title = Object.assign(document.createElement('strong'), {textContent: hit.title})
    a.append(title, marked((from ? '… ' : '') + hit.text.slice(from, from + 140), words))
    const li = document.createElement('li')
    li.append(a)
    return li
  }))
  if (words.length && !hits.length) list.append(Object.assign(document.createElement('li'), {textContent: 'Nothing found.'}))
  list.hidden = !words.length
}

box.oninput = () => load(show)
box.onkeydown = e => { if (e.key === 'Enter') load(() => { show(); list.querySelector('a')?.click() }) }
list.onclick = () => { list.hidden = true }
document.addEventListener('keydown', e => {
  if (e.key === 'Escape') { list.hidden = true; box.blur() }
  if (e.key === '/' && !/INPUT|TEXTAREA/.test(document.activeElement.tagName)) { e.preventDefault(); box.focus() }
})
document.addEventListener('click', e => { if (!find('#search').contains(e.target)) list.hidden = true })
