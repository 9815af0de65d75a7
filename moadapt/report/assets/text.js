// The text itself: every token in the colour of its expert, its gates on hover and focus.

const TEXTS_AT_FIRST = 3;
const COLOURS = 8;
const UNDERLINES = ['solid', 'dotted', 'dashed', 'wavy', 'double'];
const tip = document.getElementById('tip');
const view = { all: false, expert: null };

function hideTip() { tip.hidden = true; }

function showTip(token, words) {
  tip.textContent = words;
  tip.hidden = false;
  const box = token.getClientRects()[0] || token.getBoundingClientRect();
  const own = tip.getBoundingClientRect();
  const below = box.bottom + 6;
  tip.style.left = `${Math.min(Math.max(box.left, 8), Math.max(innerWidth - own.width - 8, 8))}px`;
  tip.style.top = `${below + own.height > innerHeight ? Math.max(box.top - own.height - 6, 4) : below}px`;
}

// A byte-level token may be half a character.
const whole = (token) => (token.toWellFormed ? token.toWellFormed() : token);
const visible = (token) => whole(token).replaceAll('\n', '⏎\n').replaceAll('\t', '⇥\t') || '∅';

function colourOf(node, expert) {
  node.classList.add(`x${expert % COLOURS}`);
  if (expert >= COLOURS) node.style.textDecoration = `underline ${UNDERLINES[(Math.floor(expert / COLOURS) - 1) % UNDERLINES.length]}`;
}

const gateWords = (router, pairs) => (pairs.length
  ? pairs.map(([expert, weight]) => `expert ${expertName(router, expert)}: ${number(Number(weight.toPrecision(4)))}`).join(', ')
  : 'no expert');

function tokenKeys(event, row, column, rows) {
  const all = rows[0];
  const jump = { ArrowLeft: column - 1, ArrowRight: column + 1, ArrowUp: column - 10, ArrowDown: column + 10, Home: 0, End: all.length - 1 }[event.key];
  return jump === undefined ? null : all[Math.min(Math.max(jump, 0), all.length - 1)];
}

function oneText(text, place, router) {
  const gates = unpack(text.routers[router.name]);
  let last = null;
  const nodes = [];
  const tokens = text.tokens.map((token, at) => {
    const pairs = gates[at];
    const first = pairs.length ? pairs[0][0] : null;
    const words = `${token.trim() ? `“${whole(token).trim()}”` : 'white space'}, ${text.part[at] ? 'answer' : 'prompt'}: ${gateWords(router, pairs)}`;
    const node = el('span', {
      role: 'option', 'aria-label': words, 'aria-selected': 'false', class: 'token', 'data-key': `text:${place}:${at}`, tabindex: -1,
      onmouseenter: () => showTip(node, words), onmouseleave: hideTip,
      onfocus: () => { node.setAttribute('aria-selected', 'true'); showTip(node, words); },
      onblur: () => { node.setAttribute('aria-selected', 'false'); hideTip(); },
    });
    // The label stands before the word, after its white space, so that the two share a line.
    const [, space, word] = /^(\s*)([^]*)$/.exec(token);
    const label = el('span', {});
    if (word) node.append(space ? visible(space) : '', label, visible(word));
    else node.append(label, visible(token));
    if (first !== null) {
      colourOf(node, first);
      const sum = pairs.reduce((total, [, weight]) => total + Math.abs(weight), 0) || 1;
      node.style.setProperty('--strength', `${Math.round(30 + (70 * Math.abs(pairs[0][1])) / sum)}%`);
      if (first !== last) label.dataset.expert = expertName(router, first);
    } else node.classList.add('noexpert');
    if (view.expert !== null && first !== view.expert) node.classList.add('faded');
    if (at && text.part[at] && !text.part[at - 1]) nodes.push(el('span', { class: 'turn', 'aria-hidden': 'true' }, 'Answer'));
    if (at && !text.part[at] && text.part[at - 1]) nodes.push(el('span', { class: 'turn', 'aria-hidden': 'true' }, 'Prompt'));
    last = first;
    nodes.push(node);
    return node;
  });
  const box = el('div', { class: 'text', role: 'listbox', 'aria-orientation': 'horizontal', 'aria-label': `A text of the task ${text.task}; the arrow keys move from token to token` }, nodes);
  rove(box, [tokens], tokenKeys);
  box.addEventListener('keydown', (event) => { if (event.key === 'Escape') hideTip(); });
  const cut = text.tokens.length < text.total ? `, tokens ${number(text.start + 1)} to ${number(text.start + text.tokens.length)} of ${number(text.total)}` : '';
  return el('article', {}, el('h3', {}, `${text.task}${cut}`), box,
    numbers('Gates as a table', () => plain(`Gates of ${routerName(router)}`, ['Token', 'Part', 'Gates'],
      text.tokens.map((token, at) => [visible(token), text.part[at] ? 'answer' : 'prompt', gateWords(router, gates[at])]))));
}

function textSection() {
  hideTip();
  const router = detail();
  if (!doc.text.length) return [absent('No text is in this document.')];
  const found = doc.text.map((text, place) => [text, place])
    .filter(([text]) => (choice.task === null || text.task === choice.task) && text.routers[router.name]);
  if (!found.length) return [absent(`No text is recorded for ${routerName(router)}${choice.task === null ? '' : ` and the task ${choice.task}`}.`)];
  const shown = view.all ? found : found.slice(0, TEXTS_AT_FIRST);
  if (view.expert !== null && view.expert >= router.experts.length) view.expert = null;
  const pick = el('select', { id: 'f-expert', onchange: (event) => { view.expert = event.target.value === '' ? null : Number(event.target.value); render(); } },
    el('option', { value: '' }, 'all'), router.experts.map((name, expert) => el('option', { value: expert, selected: expert === view.expert }, name)));
  const key = el('ul', { class: 'keys' }, router.experts.map((name, expert) => {
    const sample = el('span', { class: 'token sample' }, `expert ${name}`);
    sample.style.setProperty('--strength', '100%');
    colourOf(sample, expert);
    return el('li', {}, sample);
  }));
  return [
    para(`The gates of ${routerName(router)}. Colour: the expert with the largest gate; the stronger the colour, the larger its part of the gates. A small label stands where the expert changes. Point at a token, or move to it with the arrow keys, to read its gates.`),
    el('p', {}, el('label', {}, 'Bring out expert ', pick)),
    key,
    ...shown.map(([text, place]) => oneText(text, place, router)),
    shown.length < found.length ? el('p', {}, el('button', { type: 'button', onclick: () => { view.all = true; render(); } }, `Show all ${found.length} texts`)) : null,
  ].filter(Boolean);
}
