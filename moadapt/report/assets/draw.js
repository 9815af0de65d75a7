// Elements, colours, and the heat map: a real table that is walked with the arrow keys.

const SVG = 'http://www.w3.org/2000/svg';

function fill(node, attributes, children) {
  for (const [name, value] of Object.entries(attributes || {})) {
    if (value === null || value === undefined || value === false) continue;
    if (name.startsWith('on')) node.addEventListener(name.slice(2), value);
    else node.setAttribute(name, value === true ? '' : String(value));
  }
  node.append(...children.flat().filter((child) => child !== null && child !== undefined));
  return node;
}

const el = (tag, attributes, ...children) => fill(document.createElement(tag), attributes, children);
const svg = (tag, attributes, ...children) => fill(document.createElementNS(SVG, tag), attributes, children);

const darkScheme = matchMedia('(prefers-color-scheme: dark)');

// Cividis, the scale that colour-blind readers and black-and-white printers see alike (polynomials of d3-scale-chromatic).
function cividis(at) {
  const t = Math.min(Math.max(at, 0), 1);
  return [
    -4.54 - t * (35.34 - t * (2381.73 - t * (6402.7 - t * (7024.72 - t * 2710.57)))),
    32.49 + t * (170.73 + t * (52.82 - t * (131.46 - t * (176.58 - t * 67.37)))),
    81.24 + t * (442.36 - t * (2482.43 - t * (6167.24 - t * (6614.94 - t * 2475.67)))),
  ].map((channel) => Math.round(Math.min(Math.max(channel, 0), 255)));
}

// Large values stand out from the page: light on a dark page; dark on a light one, where small values fade into it.
function shade(at) {
  if (darkScheme.matches) return cividis(at);
  const ink = Math.min(Math.max(0.12 + 1.6 * at, 0), 1);
  return cividis(1 - at).map((channel) => Math.round(ink * channel + (1 - ink) * 255));
}

const luminance = (rgb) => {
  const [red, green, blue] = rgb.map((channel) => {
    const part = channel / 255;
    return part <= 0.04045 ? part / 12.92 : ((part + 0.055) / 1.055) ** 2.4;
  });
  return 0.2126 * red + 0.7152 * green + 0.0722 * blue;
};

function paint(node, at) {
  const rgb = shade(at);
  node.style.backgroundColor = `rgb(${rgb.join(' ')})`;
  node.style.color = luminance(rgb) > 0.179 ? '#000' : '#fff';
}

function legend(max, format, unit) {
  const steps = [0, 0.25, 0.5, 0.75, 1].map((at) => {
    const step = el('span', {}, format(at * max));
    paint(step, at);
    return step;
  });
  return el('p', { class: 'legend' }, 'Colour: ', el('span', { class: 'steps' }, ...steps), ` ${unit}`);
}

// One cell of a grid takes part in the tab order; the arrow keys move on from it.
function rove(grid, rows, keys) {
  const put = (cell) => {
    for (const row of rows) for (const other of row) if (other) other.tabIndex = -1;
    cell.tabIndex = 0;
  };
  const find = (cell) => {
    const row = rows.findIndex((cells) => cells.includes(cell));
    return [row, row < 0 ? -1 : rows[row].indexOf(cell)];
  };
  const first = rows.flat().find(Boolean);
  if (first) put(first);
  grid.addEventListener('focusin', (event) => {
    const [row, column] = find(event.target);
    if (row >= 0) put(rows[row][column]);
  });
  grid.addEventListener('keydown', (event) => {
    const [row, column] = find(event.target);
    const move = row < 0 || event.altKey || event.metaKey ? null : keys(event, row, column, rows);
    if (!move) return;
    event.preventDefault();
    move.focus();
  });
}

function gridKeys(event, row, column, rows) {
  const width = rows[row].length;
  const vertical = (from, step) => {
    for (let at = from; at >= 0 && at < rows.length; at += step) if (rows[at][column]) return rows[at][column];
    return rows[row][column];
  };
  const horizontal = (from, step, at = row) => {
    for (let place = from; place >= 0 && place < width; place += step) if (rows[at][place]) return rows[at][place];
    return rows[row][column];
  };
  const last = rows.length - 1;
  switch (event.key) {
    case 'ArrowLeft': return horizontal(column - 1, -1);
    case 'ArrowRight': return horizontal(column + 1, 1);
    case 'ArrowUp': return vertical(row - 1, -1);
    case 'ArrowDown': return vertical(row + 1, 1);
    case 'Home': return horizontal(0, 1, event.ctrlKey ? 0 : row);
    case 'End': return horizontal(width - 1, -1, event.ctrlKey ? last : row);
    case 'PageUp': return vertical(0, 1);
    case 'PageDown': return vertical(last, -1);
    default: return null;
  }
}

/* A heat map.
   id       names its cells, so that the focus survives a redraw
   rows     [{label, chosen}], cols [label]
   cell     (row, col) -> null or {value, text, say, mark}: value over max gives the colour, text is printed, say is read
   pick     (row, col) -> void, or null where cells choose nothing */
function heat({ id, caption, corner, rows, cols, cell, max, pick }) {
  const matrix = [];
  const head = el('tr', {}, el('th', { scope: 'col' }, corner), cols.map((name) => el('th', { scope: 'col' }, name)));
  const body = rows.map((row, i) => {
    matrix.push([]);
    const cells = cols.map((_, j) => {
      const found = cell(i, j);
      if (!found) {
        matrix[i].push(null);
        return el('td', { class: 'none' });
      }
      const node = el('td', {
        'data-key': `${id}:${i}:${j}`,
        'aria-label': found.say,
        class: found.mark ? `mark ${found.mark}` : null,
        'data-value': found.value,
        tabindex: -1,
      }, found.text);
      if (isNumber(found.value)) paint(node, max > 0 ? found.value / max : 0);
      if (pick) node.addEventListener('click', () => pick(i, j));
      matrix[i].push(node);
      return node;
    });
    return el('tr', { class: row.chosen ? 'chosen' : null }, el('th', { scope: 'row', title: row.label }, row.label), cells);
  });
  const name = `${id}-caption`;
  const table = el('table', { class: 'heat', role: 'grid', 'aria-labelledby': name, 'aria-readonly': 'true' },
    el('thead', {}, head), el('tbody', {}, body));
  if (pick) table.classList.add('picks');
  rove(table, matrix, (event, row, column, all) => {
    if (pick && (event.key === 'Enter' || event.key === ' ')) {
      event.preventDefault();
      pick(row, column);
      return null;
    }
    return gridKeys(event, row, column, all);
  });
  return el('figure', { class: 'heatmap' }, el('figcaption', { id: name }, caption), el('div', { class: 'scroll' }, table));
}

// A plain table behind a picture, built when it is opened.
function numbers(title, build) {
  const box = el('details', {}, el('summary', {}, title));
  box.addEventListener('toggle', () => {
    if (box.open && box.children.length === 1) box.append(el('div', { class: 'scroll' }, build()));
  });
  return box;
}

function plain(caption, head, rows) {
  return el('table', { class: 'plain' }, el('caption', {}, caption),
    el('thead', {}, el('tr', {}, head.map((name) => el('th', { scope: 'col' }, name)))),
    el('tbody', {}, rows.map((row) => el('tr', {}, row.map((item, place) => (
      place === 0 ? el('th', { scope: 'row' }, item) : el('td', {}, item)))))));
}

const para = (...children) => el('p', {}, ...children);
// Blocks beside each other where there is room.
const beside = (...blocks) => el('div', { class: 'maps' }, blocks.filter(Boolean).map((block) => el('div', { class: 'block' }, block)));
const absent = (...children) => el('p', { class: 'absent' }, ...children);
