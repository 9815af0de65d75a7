// Lines, bars and ribbons as inline SVG; each comes with a table of its numbers.

const DASHES = ['', '7 3', '2 3', '9 3 2 3', '4 2', '12 4', '1 4'];
const MARKERS = [
  (x, y) => svg('circle', { cx: x, cy: y, r: 3 }),
  (x, y) => svg('rect', { x: x - 3, y: y - 3, width: 6, height: 6 }),
  (x, y) => svg('path', { d: `M${x} ${y - 4}l4 7h-8z` }),
  (x, y) => svg('path', { d: `M${x} ${y - 4}l4 4l-4 4l-4-4z` }),
  (x, y) => svg('path', { d: `M${x} ${y + 4}l4-7h-8z` }),
  (x, y) => svg('path', { d: `M${x - 3} ${y - 3}l6 6m0-6l-6 6` }),
  (x, y) => svg('path', { d: `M${x - 4} ${y}h8m-4-4v8` }),
];

function niceMax(value) {
  if (!(value > 0)) return 1;
  const power = 10 ** Math.floor(Math.log10(value));
  return [1, 2, 4, 6, 8, 10].map((step) => step * power).find((step) => step >= value * 0.999);
}

function axes(chart, { left, right, top, bottom, yMax, yText, yLabel, xLabel }) {
  for (let tick = 0; tick <= 4; tick += 1) {
    const y = bottom - ((bottom - top) * tick) / 4;
    chart.append(
      svg('line', { class: 'rule', x1: left, x2: right, y1: y, y2: y }),
      svg('text', { class: 'tick', x: left - 6, y: y + 4, 'text-anchor': 'end' }, yText((yMax * tick) / 4)),
    );
  }
  chart.append(
    svg('text', { class: 'axis', x: left, y: top - 9 }, yLabel),
    svg('text', { class: 'axis', x: right, y: bottom + 34, 'text-anchor': 'end' }, xLabel),
  );
}

function xTicks(chart, labels, at, bottom, room) {
  const widest = Math.max(...labels.map((label) => String(label).length), 1) * 7 + 8;
  const every = Math.max(Math.ceil((widest * labels.length) / room), 1);
  labels.forEach((label, index) => {
    if (index % every === 0) chart.append(svg('text', { class: 'tick', x: at(index), y: bottom + 16, 'text-anchor': 'middle' }, label));
  });
}

/* Lines over xs. series: [{name, values, strong}]; values may have gaps (null). */
function lines({ width, caption, label, xs, xLabel, yLabel, yText, yMax, series, place }) {
  const height = 270;
  const [left, right, top, bottom] = [52, width - 14, 26, height - 42];
  const low = xs[0];
  const span = xs[xs.length - 1] - low || 1;
  const at = (index) => (xs.length === 1 ? (left + right) / 2 : left + ((right - left) * (place ? index / (xs.length - 1) : (xs[index] - low) / span)));
  const up = (value) => bottom - ((bottom - top) * Math.min(value, yMax)) / yMax;
  const chart = svg('svg', { class: 'chart', role: 'img', 'aria-label': label, width, height, viewBox: `0 0 ${width} ${height}` });
  if (series.length > 4) chart.classList.add('many');
  axes(chart, { left, right, top, bottom, yMax, yText: yText === percent ? axisPercent : yText, yLabel, xLabel });
  xTicks(chart, xs, at, bottom, right - left);
  const keys = series.map((line, index) => {
    const style = index % DASHES.length;
    const group = svg('g', { class: `line c${index % 7}${line.strong ? ' strong' : ''}` });
    let path = '';
    let pen = 'M';
    line.values.forEach((value, place_) => {
      if (!isNumber(value)) { pen = 'M'; return; }
      path += `${pen}${at(place_).toFixed(1)} ${up(value).toFixed(1)}`;
      pen = 'L';
    });
    group.append(svg('path', { class: 'stroke', d: path, 'stroke-dasharray': DASHES[style] }));
    line.values.forEach((value, place_) => {
      if (!isNumber(value) || (xs.length > 60 && place_ % Math.ceil(xs.length / 30))) return;
      const dot = MARKERS[style](at(place_), up(value));
      dot.classList.add('dot');
      dot.append(svg('title', {}, `${line.name}, ${xLabel} ${xs[place_]}: ${yText(value)}`));
      group.append(dot);
    });
    chart.append(group);
    const sample = svg('svg', { width: 34, height: 12, 'aria-hidden': 'true' }, svg('g', { class: `line c${index % 7}` },
      svg('path', { class: 'stroke', d: 'M1 6H33', 'stroke-dasharray': DASHES[style] }), MARKERS[style](17, 6)));
    sample.querySelector('g').lastChild.classList.add('dot');
    return el('li', { class: line.strong ? 'strong' : null }, sample, ` ${line.name}`);
  });
  return el('figure', {}, el('figcaption', {}, caption), chart, series.length > 1 ? el('ul', { class: 'keys' }, keys) : null,
    numbers('Numbers of this picture', () => plain(caption, [xLabel, ...series.map((line) => line.name)],
      xs.map((x, place_) => [String(x), ...series.map((line) => number(line.values[place_]))]))));
}

/* Bars with optional intervals (low, high) and a dashed rule. */
function bars({ width, caption, label, labels, xLabel, yLabel, yText, values, low, high, rule, head }) {
  const height = 230;
  const [left, right, top, bottom] = [52, width - 14, 26, height - 42];
  const yMax = niceMax(Math.max(...values.filter(isNumber), ...(high || []).filter(isNumber), rule || 0, 1e-9));
  const step = (right - left) / values.length;
  const at = (index) => left + step * (index + 0.5);
  const up = (value) => bottom - ((bottom - top) * value) / yMax;
  const chart = svg('svg', { class: 'chart', role: 'img', 'aria-label': label, width, height, viewBox: `0 0 ${width} ${height}` });
  axes(chart, { left, right, top, bottom, yMax, yText: yText === percent ? axisPercent : yText, yLabel, xLabel });
  xTicks(chart, labels, at, bottom, right - left);
  const wide = Math.min(step * 0.72, 46);
  values.forEach((value, index) => {
    if (!isNumber(value)) return;
    const title = `${labels[index]}: ${yText(value)}${low ? ` (${yText(low[index])} to ${yText(high[index])})` : ''}`;
    chart.append(svg('rect', { class: 'bar', x: at(index) - wide / 2, y: up(value), width: wide, height: bottom - up(value) }, svg('title', {}, title)));
    if (!low || !isNumber(low[index]) || !isNumber(high[index])) return;
    const [y1, y2, x] = [up(low[index]), up(high[index]), at(index)];
    chart.append(svg('path', { class: 'whisker', d: `M${x} ${y1}V${y2}M${x - 4} ${y1}h8M${x - 4} ${y2}h8` }));
  });
  if (isNumber(rule)) chart.append(svg('line', { class: 'fair', x1: left, x2: right, y1: up(rule), y2: up(rule) }));
  return el('figure', {}, el('figcaption', {}, caption), chart,
    numbers('Numbers of this picture', () => plain(caption, head, values.map((value, index) => [
      String(labels[index]), number(value), ...(low ? [number(low[index]), number(high[index])] : [])]))));
}

/* Ribbons between columns of experts.
   columns  [{title, labels, shares}], links [matrix P(to | from)] between neighbouring columns */
function ribbons({ width, caption, label, columns, links }) {
  const most = Math.max(...columns.map((column) => column.shares.length));
  const [top, gap, bar] = [30, 6, 14];
  const tall = Math.max(220, most * 22);
  const height = top + tall + gap * most + 10;
  const [left, right] = [34, width - 34 - bar];
  const chart = svg('svg', { class: 'chart', role: 'img', 'aria-label': label, width, height, viewBox: `0 0 ${width} ${height}` });
  const nodes = columns.map((column, place) => {
    const x = left + ((right - left) * place) / (columns.length - 1);
    const whole = column.shares.reduce((sum, share) => sum + (share || 0), 0) || 1;
    let y = top;
    return column.shares.map((share) => {
      const node = { x, y, height: (tall * (share || 0)) / whole };
      y += node.height + gap;
      return node;
    });
  });
  links.forEach((matrix, place) => {
    const arriving = nodes[place + 1].map((_, to) => matrix.reduce((sum, row, from) => sum + nodes[place][from].height * (row[to] || 0), 0));
    const used = nodes[place + 1].map(() => 0);
    matrix.forEach((row, from) => {
      const source = nodes[place][from];
      const best = Math.max(...row.map((value) => value || 0));
      let out = 0;
      row.forEach((value, to) => {
        const target = nodes[place + 1][to];
        const leaving = source.height * (value || 0);
        const coming = arriving[to] > 0 ? (leaving / arriving[to]) * target.height : 0;
        if (leaving > 0.15 && coming > 0) {
          const [x1, x2] = [source.x + bar, target.x];
          const middle = (x1 + x2) / 2;
          const [y1, y2] = [source.y + out, target.y + used[to]];
          chart.append(svg('path', {
            class: value === best ? 'ribbon best' : 'ribbon',
            d: `M${x1} ${y1}C${middle} ${y1} ${middle} ${y2} ${x2} ${y2}v${coming}C${middle} ${y2 + coming} ${middle} ${y1 + leaving} ${x1} ${y1 + leaving}z`,
          }, svg('title', {}, `${columns[place].labels[from]} to ${columns[place + 1].labels[to]}: ${percent(value)} %`)));
        }
        out += leaving;
        used[to] += coming;
      });
    });
  });
  nodes.forEach((column, place) => {
    const end = place === columns.length - 1;
    const anchor = place === 0 ? 'start' : end ? 'end' : 'middle';
    const at = place === 0 ? 0 : end ? width : column[0].x + bar / 2;
    chart.append(svg('text', { class: 'axis', x: at, y: 14, 'text-anchor': anchor }, columns[place].title));
    column.forEach((node, expert) => {
      const middle = node.y + node.height / 2 + 4;
      chart.append(svg('rect', { class: 'bar', x: node.x, y: node.y, width: bar, height: Math.max(node.height, 1) }));
      chart.append(svg('text', end
        ? { class: 'tick', x: node.x + bar + 5, y: middle }
        : { class: 'tick', x: node.x - 5, y: middle, 'text-anchor': 'end' }, columns[place].labels[expert]));
    });
  });
  return el('figure', {}, el('figcaption', {}, caption), chart);
}
