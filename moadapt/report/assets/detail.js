// The sections about one router and its neighbours: tasks, entropy, pairs of experts, flow, training.

function tasksSection() {
  const router = detail();
  const table = router.by_task;
  if (!table?.tasks.length) return [absent('The data named no tasks.')];
  const picked = table.tasks.map((_, row) => row).filter((row) => choice.task === null || table.tasks[row] === choice.task);
  if (!picked.length) return [absent(`${routerName(router)} saw no token of the task ${choice.task}.`)];
  const max = Math.max(...table.share.flat().filter(isNumber), 1e-9);
  const body = [
    para(`In ${routerName(router)}: the share of each task's selections that an expert gets, in per cent. `,
      'An arrow marks a share that differs from that of the other tasks by more than chance: ▲ above them, ▼ below.'),
    para(isNumber(table.information)
      ? `The task tells ${percent(table.information)} % of what it could tell about the expert; by chance alone it would be ${percent(table.baseline)} % (${pValue(table.p)}).`
      : 'How much the task tells about the expert is not known here.'),
    legend(max, (value) => percent(value, 0), '% of the selections of a task'),
    heat({
      id: 'tasks',
      caption: `Task by expert, ${routerName(router)}`,
      corner: 'Task',
      rows: picked.map((row) => ({ label: table.tasks[row] })),
      cols: router.experts,
      max,
      cell: (i, j) => {
        const value = table.share[picked[i]][j];
        const significant = table.significant?.[picked[i]][j];
        const difference = table.difference?.[picked[i]]?.[j] ?? value - router.load.share[j];
        const above = difference > 0;
        return {
          value,
          text: `${percent(value)}${significant ? (above ? ' ▲' : ' ▼') : ''}`,
          mark: significant ? 'significant' : null,
          say: `task ${table.tasks[picked[i]]}, expert ${expertName(router, j)}: ${percent(value)} %${significant ? `, significantly ${above ? 'above' : 'below'} the other tasks` : ''}`,
        };
      },
    }),
  ];
  const apart = [];
  if (router.task_distance && table.tasks.length > 1) {
    apart.push(el('h3', {}, 'Distance between tasks'),
      para('Jensen–Shannon distance of two tasks\' shares: 0 where they use the experts alike, 1 where they share none.'),
      legend(1, short, ''),
      heat({
        id: 'distance',
        caption: `Distance between tasks, ${routerName(router)}`,
        corner: 'Task',
        rows: picked.map((row) => ({ label: `${row + 1} ${table.tasks[row]}` })),
        cols: table.tasks.map((_, row) => String(row + 1)),
        max: 1,
        cell: (i, j) => {
          const value = router.task_distance[picked[i]][j];
          return { value, text: short(value), say: `${table.tasks[picked[i]]} and ${table.tasks[j]}: ${short(value)}` };
        },
      }));
  }
  return [...body.slice(0, 2), beside(body.slice(2), apart.length ? apart : null)];
}

function entropySection() {
  const shown = matching();
  if (!shown.length) return [absent('No router matches the filters.')];
  const xs = unique(shown.map((router) => router.layer)).filter(isNumber).sort((a, b) => a - b);
  const router = detail();
  const body = [para('Entropy of the probabilities of one row (token or decision), averaged, as a share of the largest possible, ln N. Near 100 %: the router hardly chooses. Near 0 %: it is sure.')];
  if (xs.length) {
    const series = unique(shown.map((item) => item.module)).map((module) => ({
      name: moduleName(module),
      strong: module === router.module,
      values: xs.map((layer) => shown.find((item) => item.module === module && item.layer === layer)?.measures?.normalised_entropy ?? null),
    }));
    body.push(lines({
      width: chartWidth(1100), caption: 'Normalised entropy by layer', label: `Lines: normalised entropy over ${xs.length} layers for ${series.length} modules. The numbers are in the table below.`,
      xs, xLabel: 'layer', yLabel: '% of ln N', yText: percent, yMax: 1, series, place: true,
    }));
  }
  const below = [];
  const histogram = router.measures?.entropy_histogram;
  if (histogram?.length) {
    const rows = histogram.reduce((sum, count) => sum + count, 0) || 1;
    below.push(bars({
      width: chartWidth(600), caption: `How sure ${routerName(router)} is: ${rowsName(router)} by entropy`,
      label: `Histogram of the entropy of ${routerName(router)} over ${histogram.length} bins. The numbers are in the table below.`,
      labels: histogram.map((_, bin) => String(Math.round((100 * bin) / histogram.length))), xLabel: 'entropy, % of ln N (lower edge)', yLabel: `% of the ${rowsName(router)}`,
      yText: percent, values: histogram.map((count) => count / rows), head: ['Lower edge, % of ln N', 'Share'],
    }));
  }
  const active = router.measures?.active_histogram;
  if (active?.length && active.filter((count) => count > 0).length > 1) {
    const rows = active.reduce((sum, count) => sum + count, 0) || 1;
    below.push(bars({
      width: chartWidth(600), caption: `Experts per row, ${routerName(router)}`, label: `Histogram of the number of experts per row, on average ${number(router.measures.experts_per_row)}. The numbers are in the table below.`,
      labels: active.map((_, count) => String(count)), xLabel: 'experts of a row', yLabel: `% of the ${rowsName(router)}`, yText: percent,
      values: active.map((count) => count / rows), head: ['Experts', 'Share'],
    }));
  }
  return [...body, beside(...below)];
}

function square(id, caption, router, matrix, say, max, format) {
  return heat({
    id, caption, corner: 'Expert', rows: router.experts.map((name) => ({ label: name })), cols: router.experts, max,
    cell: (i, j) => (i === j ? null : { value: matrix[i][j], text: format(matrix[i][j]), say: say(i, j, format(matrix[i][j])) }),
  });
}

function togetherSection() {
  const router = detail();
  const body = [];
  const likeness = [];
  if (!router.coactivation) body.push(absent('Co-activation is not in this document.'));
  else if (isNumber(router.measures?.experts_per_row) && router.measures.experts_per_row <= 1) body.push(absent(`${routerName(router)} selects at most one expert per row: no two work together.`));
  else {
    body.push(
      para(`Of the ${rowsName(router)} that selected the expert of the row, the percentage that also selected the expert of the column.`),
      legend(1, (value) => percent(value, 0), '% of the rows of an expert'),
      square('together', `Selected together, ${routerName(router)}`, router, router.coactivation,
        (i, j, text) => `with expert ${expertName(router, i)} also expert ${expertName(router, j)}: ${text} %`, 1, percent),
    );
  }
  const similar = doc.similarity?.[router.name];
  if (similar) {
    likeness.push(el('h3', {}, 'Similarity of the experts'),
      para('Cosine of what two experts add. Colour by its size; a minus sign means that they pull apart.'),
      legend(1, short, 'in size'),
      heat({
        id: 'similar', caption: `Similarity, ${routerName(router)}`, corner: 'Expert', rows: router.experts.map((name) => ({ label: name })), cols: router.experts, max: 1,
        cell: (i, j) => (i === j ? null : { value: isNumber(similar[i][j]) ? Math.abs(similar[i][j]) : null, text: short(similar[i][j]), say: `experts ${expertName(router, i)} and ${expertName(router, j)}: ${short(similar[i][j])}` }),
      }));
  }
  return [beside(body, likeness.length ? likeness : null)];
}

function flowSection() {
  const router = detail();
  const flow = doc.flow || [];
  const before = flow.find((item) => item.to === router.name && routerByName.has(item.from));
  const after = flow.find((item) => item.from === router.name && routerByName.has(item.to));
  if (!before && !after) return [absent(`No flow is recorded into or out of ${routerName(router)}.`)];
  const chain = [before && routerByName.get(before.from), router, after && routerByName.get(after.to)].filter(Boolean);
  const links = [before, after].filter(Boolean);
  return [
    para('Where the rows of an expert go in the next layer of the same module, by their first choices. The darkest ribbon of each expert is its most frequent way.'),
    ribbons({
      width: chartWidth(900), caption: `Flow around ${routerName(router)}`,
      label: `Ribbons between the experts of ${chain.map((item) => layerName(item.layer)).join(', ')}. The numbers are in the tables below.`,
      columns: chain.map((item) => ({ title: layerName(item.layer), labels: item.experts, shares: item.load.share })),
      links: links.map((item) => item.share),
    }),
    ...links.map((item, place) => {
      const [from, to] = [routerByName.get(item.from), routerByName.get(item.to)];
      return numbers(`Numbers: ${layerName(from.layer)} to ${layerName(to.layer)}`, () => heat({
        id: `flow-${place}`, caption: `Per cent of the rows of an expert of ${layerName(from.layer)} that go to each expert of ${layerName(to.layer)}`, corner: 'From', max: 1,
        rows: from.experts.map((name) => ({ label: name })), cols: to.experts,
        cell: (i, j) => ({ value: item.share[i][j], text: percent(item.share[i][j]), say: `expert ${expertName(from, i)} to expert ${expertName(to, j)}: ${percent(item.share[i][j])} %` }),
      }));
    }),
  ];
}

function trainingSection() {
  const log = doc.training || [];
  if (!log.length) return [absent('The run logged no routing during training.')];
  const shown = matching();
  const router = detail();
  const names = unique(log.flatMap((row) => Object.entries(row).filter(([key]) => routerByName.has(key)).flatMap(([, values]) => Object.keys(values))));
  if (!shown.length || !names.length) return [absent('Nothing logged for these routers.')];
  const xs = log.map((row) => row.step);
  return [
    para(`The router ${routerName(router)} against the mean, the lowest and the highest of the ${shown.length === 1 ? 'router' : `${shown.length} routers`} that the filters keep.`),
    el('div', { class: 'maps' }, names.map((name) => {
      const values = log.map((row) => shown.map((item) => row[item.name]?.[name]).filter(isNumber));
      const reduce = (of) => values.map((found) => (found.length ? of(found) : null));
      const series = [{ name: routerName(router), strong: true, values: log.map((row) => row[router.name]?.[name] ?? null) }];
      if (shown.length > 1) {
        series.push({ name: 'mean', values: reduce((found) => found.reduce((sum, value) => sum + value, 0) / found.length) },
          { name: 'lowest', values: reduce((found) => Math.min(...found)) }, { name: 'highest', values: reduce((found) => Math.max(...found)) });
      }
      const title = name.replaceAll('_', ' ');
      return lines({
        width: chartWidth(520), caption: title, label: `Lines: ${title} over ${xs.length} logged steps. The numbers are in the table below.`, xs, xLabel: 'step', yLabel: title,
        yText: (value) => number(Number(value.toPrecision(3))), yMax: niceMax(Math.max(...series.flatMap((line) => line.values).filter(isNumber), 1e-9)), series,
      });
    })),
  ];
}

const TERMS = [
  ['Load', 'Selections of an expert over all selections of its router. Counts are exact, over real tokens only.'],
  ['MaxVio', 'Load of the busiest expert over the mean load, less 1. 0: perfectly even; N − 1: one expert takes all.'],
  ['Effective number of experts', 'exp of the entropy of the load: N when even, 1 when one expert takes all.'],
  ['Dead expert', 'An expert that is selected (almost) never.'],
  ['Entropy of a row', 'How undecided the router is about one token (or decision), before selection; its maximum is ln N.'],
  ['Information of a token on its expert', 'H(mean p) − mean H(p): high when rows are sure, and differ.'],
  ['Task information', 'Mutual information of task and expert as a share of the possible. The chance baseline and the p-value come from shuffling the tasks among whole sequences.'],
  ['Interval', 'Where the load would lie in 95 of 100 repetitions with other sequences of the same kind.'],
  ['Prefill, decoding', 'Tokens read in one pass, and tokens generated one by one.'],
];

const termsSection = () => [el('dl', { class: 'terms' }, TERMS.map(([name, words]) => el('div', {}, el('dt', {}, name), el('dd', {}, words)))),
  para('The full definitions are in the documentation, docs/statistics.md.')];
