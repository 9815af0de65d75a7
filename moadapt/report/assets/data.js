// The document, what the reader chose, and numbers as text.

const doc = JSON.parse(document.getElementById('data').textContent);
const routers = doc.routers;
const routerByName = new Map(routers.map((router) => [router.name, router]));
const unique = (items) => [...new Set(items)];
const modules = unique(routers.map((router) => router.module));
const layers = unique(routers.map((router) => router.layer));
const tasks = unique([
  ...(doc.data.tasks || []).map((task) => task.name),
  ...routers.flatMap((router) => router.by_task?.tasks || []),
]);

const choice = { module: null, layer: null, task: null, router: routers[0].name, part: 'all', measure: null };

const moduleName = (module) => module || 'whole block';
const layerName = (layer) => (layer === null || layer === undefined ? 'no layer' : `layer ${layer}`);
const routerName = (router) => `${layerName(router.layer)}, ${moduleName(router.module)}`;
const expertName = (router, expert) => router.experts[expert] ?? String(expert);
const rowsName = (router) => (router.granularity === 'token' ? 'tokens' : 'decisions');

const matching = () => routers.filter(
  (router) => (choice.module === null || router.module === choice.module)
    && (choice.layer === null || router.layer === choice.layer),
);
const detail = () => routerByName.get(choice.router);

const isNumber = (value) => typeof value === 'number' && Number.isFinite(value);

function number(value) {
  if (!isNumber(value)) return '–';
  if (Number.isInteger(value)) return value.toLocaleString('en');
  const size = Math.abs(value);
  return size >= 1e-4 && size < 1e6 ? String(Number(value.toPrecision(4))) : value.toExponential(2);
}

// A share in per cent, without the sign: the captions say it.
function percent(value, digits = 1) {
  if (!isNumber(value)) return '–';
  const text = (100 * value).toFixed(digits);
  return value > 0 && Number(text) === 0 ? `<${(10 ** -digits).toFixed(digits)}` : text;
}

// The same on an axis, without decimals that say nothing.
const axisPercent = (value) => String(Number((100 * value).toPrecision(3)));

// Fixed decimals that line up in a table of numbers around one.
const short = (value) => {
  if (!isNumber(value)) return '–';
  return Math.abs(value) >= 99.95 ? String(Math.round(value)) : value.toFixed(Math.abs(value) >= 9.995 ? 1 : 2);
};

// p-values come from permutations: the smallest possible one is a bound, not zero.
const pValue = (value) => (isNumber(value) ? `p = ${Number(value.toPrecision(2))}` : 'no p-value');

const ALPHABET = 'ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_';
const digitOf = new Map([...ALPHABET].map((letter, place) => [letter, place]));

// Packed gates of a router (packing.py) -> for every token its [expert, weight] pairs, the heaviest first.
function unpack(packed) {
  const { scale, digits, counts, runs, pairs } = packed;
  const step = digits + 3;
  const read = (from, length) => {
    let value = 0;
    for (let place = from; place < from + length; place += 1) value = 64 * value + digitOf.get(pairs[place]);
    return value;
  };
  const entries = [];
  let at = 0;
  for (let index = 0; Array.isArray(counts) ? index < counts.length : entries.length * counts * step < pairs.length; index += 1) {
    const entry = [];
    for (let pair = 0; pair < (Array.isArray(counts) ? counts[index] : counts); pair += 1, at += step) {
      entry.push([read(at, digits), ((read(at + digits, 3) - 131072) / 131071) * scale]);
    }
    entries.push(entry);
  }
  return runs ? entries.flatMap((entry, index) => Array(runs[index]).fill(entry)) : entries;
}
