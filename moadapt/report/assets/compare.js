// The section about another model on the same data; the page has none where nothing was compared.

const COMPARED = [
  ['MaxVio', 'max_violation', short],
  ['Entropy, % of maximum', 'normalised_entropy', percent],
  ['Dead experts', 'dead', number],
  ['Task information, %', 'task_information', percent],
];
const SUMMED = [
  ['Dead experts', 'dead_experts', number],
  ['Mean MaxVio', 'mean_max_violation', number],
  ['Mean entropy, % of maximum', 'mean_normalised_entropy', percent],
  ['Task information, % of possible', 'task_information', percent],
];

function comparedRouters(shown) {
  const head = ['Router', 'Load distance', ...COMPARED.flatMap(([name]) => [`${name}: this`, `${name}: other`]), 'Saturation, %', 'by chance, %'];
  return plain('Every router of both', head, shown.map(([router, found]) => [
    routerName(router), short(found.load_distance),
    ...COMPARED.flatMap(([, key, format]) => [format(found.first[key]), format(found.second[key])]),
    percent(found.saturation), percent(found.chance_saturation),
  ]));
}

function compareSection() {
  const { compare } = doc;
  const found = new Map(compare.routers.map((router) => [router.name, router]));
  const shown = matching().filter((router) => found.has(router.name)).map((router) => [router, found.get(router.name)]);
  const body = [
    para(`This model beside “${compare.other_title}”, on the same data.`),
    plain('All routers', ['Measure', 'This', 'Other'], SUMMED.map(([name, key, format]) => [name, format(doc.summary[key]), format(compare.other_summary[key])])),
  ];
  for (const [side, names] of [['this model', compare.only_first], ['the other', compare.only_second]]) {
    if (names.length) body.push(para(`Only ${side} has ${names.length === 1 ? 'the router' : `${names.length} routers, as`} ${names[0]}.`));
  }
  if (!shown.length) return [...body, absent('No router of both matches the filters.')];
  const rows = unique(shown.map(([router]) => router.layer));
  const cols = unique(shown.map(([router]) => router.module));
  const at = (i, j) => shown.find(([router]) => router.layer === rows[i] && router.module === cols[j]);
  body.push(
    para('Load distance: Jensen–Shannon distance of the two loads, 0 where they are the same, 1 where no expert has a share in both. Saturation: the part of the other model\'s selections that this one had made for the same rows. Both mean something only where experts of the same number are the same experts, as in two checkpoints of one run.'),
    legend(1, short, ''),
    heat({
      id: 'compared', caption: 'Load distance', corner: 'Layer', rows: rows.map((layer) => ({ label: layer === null ? 'none' : String(layer) })), cols: cols.map(moduleName), max: 1,
      pick: (i, j) => { choice.router = at(i, j)[0].name; render(); },
      cell: (i, j) => {
        const pair = at(i, j);
        if (!pair) return null;
        const value = pair[1].load_distance;
        return { value, text: short(value), say: `${routerName(pair[0])}: ${short(value)}` };
      },
    }),
    numbers('Numbers of every router', () => comparedRouters(shown)),
  );
  return body;
}
