// The sections about all routers: summary, load of the experts, measures by layer and module.

const LEVELS = {
  alarm: ['✖', 'Alarm'], error: ['✖', 'Error'], warning: ['▲', 'Warning'], note: ['●', 'Note'], ok: ['✔', 'Good'],
};
const ORDER = Object.keys(LEVELS);
const VERDICTS_AT_FIRST = 10;

const MEASURES = {
  normalised_entropy: ['Entropy of a row, % of the maximum', (value) => percent(value, 0), () => 1],
  max_violation: ['MaxVio: load of the busiest expert over the mean, less 1', short, null],
  cv: ['Coefficient of variation of the load', short, null],
  gini: ['Gini of the load', short, () => 1],
  effective_experts: ['Effective number of experts', short, null],
  dead: ['Dead experts', (value) => number(value), null],
  mi_token_expert: ['Information of a token on its expert (nats)', short, null],
  experts_per_row: ['Experts per row', short, null],
  information: ['Information of the task on the expert, % of the possible', (value) => percent(value), null],
};

function measureOf(router, name) {
  if (name === 'information') return router.by_task?.information;
  const value = router.measures?.[name];
  return name === 'dead' ? value?.length : value;
}

function facts() {
  document.getElementById('made').textContent = `Written by ${doc.created_by || 'moadapt'}.`;
  const pairs = [
    ['Adapter', doc.model.adapter], ['Base model', doc.model.base], ['Preset', doc.model.preset],
    ['Expert', doc.model.expert], ['Router', doc.model.router], ['Granularity', doc.model.granularity],
    ['Scope', doc.model.scope], ['Expert unit', doc.model.expert_unit],
    ['Tokens', number(doc.data.tokens)], ['Sequences', number(doc.data.sequences)],
  ].filter(([, value]) => value !== null && value !== undefined && value !== '–');
  document.getElementById('facts').append(...pairs.map(([name, value]) => el('div', {}, el('dt', {}, name), el('dd', {}, value))));
  document.getElementById('contents').append(...[...document.querySelectorAll('main section')].map(
    (section) => el('li', {}, el('a', { href: `#${section.id}` }, section.querySelector('h2').textContent)),
  ));
}

function verdictItem(verdict) {
  const [sign, word] = LEVELS[verdict.level] || ['●', verdict.level];
  const router = routerByName.get(verdict.router);
  const show = router && el('button', {
    type: 'button', 'aria-label': `Show ${routerName(router)}: ${verdict.text}`, onclick: () => focusOn(router),
  }, 'Show');
  return el('li', { class: `verdict is-${verdict.level}`, 'data-value': isNumber(verdict.value) ? verdict.value : null },
    el('span', { class: 'badge' }, el('span', { 'aria-hidden': 'true' }, `${sign}\u00a0`), word), el('span', { class: 'words' }, verdict.text), show);
}

function summary() {
  const s = doc.summary;
  const cards = [
    ['Routers', number(s.num_routers)],
    ['Experts', number(s.num_experts)],
    ['Dead experts', number(s.dead_experts)],
    ['Mean MaxVio', number(s.mean_max_violation)],
    ['Mean entropy, % of maximum', percent(s.mean_normalised_entropy)],
    ['Task information, % of possible', percent(s.task_information), isNumber(s.task_information_p) ? pValue(s.task_information_p) : null],
  ];
  // A verdict about the whole mixture comes before those about one router, a worse one before a better one.
  const rank = (verdict) => [routerByName.has(verdict.router) ? 1 : 0, (ORDER.indexOf(verdict.level) + ORDER.length + 1) % (ORDER.length + 1)];
  const sorted = doc.verdicts.map((verdict, place) => [...rank(verdict), place, verdict])
    .sort((a, b) => a[0] - b[0] || a[1] - b[1] || a[2] - b[2]).map((item) => item[3]);
  const hidden = sorted.slice(VERDICTS_AT_FIRST);
  const body = [
    el('dl', { class: 'cards' }, cards.map(([name, value, note]) => el('div', {}, el('dt', {}, name), el('dd', {}, value, note ? el('small', {}, ` ${note}`) : null)))),
    el('h3', {}, 'Verdicts'),
    sorted.length ? el('ul', { class: 'verdicts' }, sorted.slice(0, VERDICTS_AT_FIRST).map(verdictItem)) : absent('None.'),
    hidden.length ? el('details', { class: 'more' }, el('summary', {}, `${hidden.length} more`), el('ul', { class: 'verdicts' }, hidden.map(verdictItem))) : null,
  ];
  if (doc.left_out.length) body.push(el('p', { class: 'note' }, `Left out to keep this page small: ${doc.left_out.join(', ')}. All of it is in routing.json.`));
  if (doc.data.tasks?.length) {
    body.push(numbers(`The data: ${doc.data.tasks.length} ${doc.data.tasks.length === 1 ? 'task' : 'tasks'}`, () => plain('Sequences and tokens by task', ['Task', 'Sequences', 'Tokens'],
      doc.data.tasks.map((task) => [task.name, number(task.sequences), number(task.tokens)]))));
  }
  return body.filter(Boolean);
}

const PARTS = {
  all: ['All tokens', (router) => router.load.share],
  prompt: ['Prompt tokens', (router) => router.by_part?.prompt],
  answer: ['Answer tokens', (router) => router.by_part?.answer],
  prefill: ['Prefill', (router) => router.by_phase?.prefill],
  decode: ['Decoding', (router) => router.by_phase?.decode],
};

// The share of each expert among the tokens that the reader chose, or null where it was not recorded.
function chosenShare(router) {
  if (choice.task === null) return PARTS[choice.part][1](router) || null;
  const row = router.by_task?.tasks.indexOf(choice.task) ?? -1;
  return row < 0 ? null : router.by_task.share[row];
}

function loadMap(module, max) {
  const rows = matching().filter((router) => router.module === module);
  const width = Math.max(...rows.map((router) => router.experts.length));
  const named = rows.every((router) => router.experts.join('\n') === rows[0].experts.join('\n'));
  const cols = Array.from({ length: width }, (_, expert) => (named ? expertName(rows[0], expert) : String(expert)));
  return heat({
    id: `load-${modules.indexOf(module)}`,
    caption: moduleName(module),
    corner: 'Layer',
    rows: rows.map((router) => ({ label: router.layer === null ? router.name : String(router.layer), chosen: router.name === choice.router })),
    cols,
    max,
    pick: (i) => { choice.router = rows[i].name; render(); },
    cell: (i, j) => {
      const router = rows[i];
      if (j >= router.experts.length) return null;
      const value = chosenShare(router)?.[j];
      const dead = (router.measures?.dead || []).includes(j);
      return {
        value: value ?? null,
        text: `${percent(value)}${dead ? ' †' : ''}`,
        mark: dead ? 'dead' : null,
        say: `${layerName(router.layer)}, expert ${expertName(router, j)}: ${percent(value)} %${dead ? ', dead' : ''}`,
      };
    },
  });
}

function load() {
  const shown = matching();
  if (!shown.length) return [absent('No router matches the filters.')];
  const max = Math.max(...shown.flatMap((router) => chosenShare(router) || []), 1e-9);
  const part = el('select', { id: 'f-part', disabled: choice.task !== null, onchange: (event) => { choice.part = event.target.value; render(); } },
    Object.entries(PARTS).filter(([key, [, get]]) => key === 'all' || routers.some((router) => (get(router) || []).some(isNumber)))
      .map(([key, [name]]) => el('option', { value: key, selected: key === choice.part }, name)));
  const router = detail();
  const what = choice.task === null ? PARTS[choice.part][0].toLowerCase() : `tokens of the task ${choice.task}`;
  return [
    para('Share of its selections, in per cent, that a router gives each expert. Fair is 1/N. Choose a row (click, or arrow keys and Enter) to see its router in detail below.'),
    el('p', {}, el('label', {}, 'Tokens ', part), choice.task === null ? null : ` shown: ${what}`),
    legend(max, (value) => percent(value, 0), '% of the selections. †: a dead expert.'),
    el('div', { class: 'maps' }, unique(shown.map((item) => item.module)).map((module) => loadMap(module, max))),
    bars({
      width: chartWidth(760),
      caption: `Load of ${routerName(router)}, all tokens, with 95 % intervals`,
      label: `Bars: load of the ${router.experts.length} experts of ${routerName(router)}; the busiest takes ${percent(Math.max(...router.load.share))} %. The numbers are in the table below.`,
      labels: router.experts, xLabel: 'expert', yLabel: '% of the selections', yText: percent,
      values: router.load.share, low: router.load.low, high: router.load.high, rule: 1 / router.experts.length,
      head: ['Expert', 'Share', 'Low', 'High'],
    }),
    para(`Dashed: the fair share. The router saw ${number(router.rows)} ${rowsName(router)}.`),
  ];
}

function balance() {
  const shown = matching();
  if (!shown.length) return [absent('No router matches the filters.')];
  const names = Object.keys(MEASURES).filter((name) => routers.some((router) => isNumber(measureOf(router, name))));
  if (!names.length) return [absent('No measures in this document.')];
  if (!names.includes(choice.measure)) [choice.measure] = names;
  const [title, format, top] = MEASURES[choice.measure];
  const max = top ? top() : Math.max(...routers.map((router) => measureOf(router, choice.measure)).filter(isNumber), 1e-9);
  const rows = unique(shown.map((router) => router.layer));
  const cols = unique(shown.map((router) => router.module));
  const found = (i, j) => shown.find((router) => router.layer === rows[i] && router.module === cols[j]);
  const pick = el('select', { id: 'f-measure', onchange: (event) => { choice.measure = event.target.value; render(); } },
    names.map((name) => el('option', { value: name, selected: name === choice.measure }, MEASURES[name][0])));
  return [
    el('p', {}, el('label', {}, 'Measure ', pick)),
    legend(max, format, ''),
    heat({
      id: 'balance',
      caption: title,
      corner: 'Layer',
      rows: rows.map((layer) => ({ label: layer === null ? 'none' : String(layer) })),
      cols: cols.map(moduleName),
      max,
      pick: (i, j) => { choice.router = found(i, j).name; render(); },
      cell: (i, j) => {
        const router = found(i, j);
        if (!router) return null;
        const value = measureOf(router, choice.measure);
        return { value: value ?? null, text: format(value), say: `${routerName(router)}: ${format(value)}` };
      },
    }),
  ];
}
