// Filters, and drawing the page anew when the reader chooses something.

const SECTIONS = {
  load, balance, tasks: tasksSection, entropy: entropySection, together: togetherSection,
  flow: flowSection, training: trainingSection, text: textSection,
};
if (doc.compare) SECTIONS.compare = compareSection;
else document.getElementById('compare').remove();

const bodyOf = (id) => document.querySelector(`#${id} > .body`);
const chartWidth = (most) => Math.max(Math.min(bodyOf('load').clientWidth, most), 280);

const EVERY = '*';
const control = Object.fromEntries(['module', 'layer', 'task', 'router'].map((name) => [name, document.getElementById(`f-${name}`)]));

function options(select, items, every) {
  select.replaceChildren(...(every ? [el('option', { value: EVERY }, every)] : []), ...items.map(([value, name]) => el('option', { value }, name)));
}

function fillControls() {
  options(control.module, modules.map((module, place) => [place, moduleName(module)]), 'all modules');
  options(control.layer, layers.map((layer, place) => [place, layerName(layer)]), 'all layers');
  options(control.task, tasks.map((task, place) => [place, task]), 'all tasks');
  for (const [name, items] of [['module', modules], ['layer', layers], ['task', tasks]]) {
    control[name].addEventListener('change', () => {
      choice[name] = control[name].value === EVERY ? null : items[Number(control[name].value)];
      render();
    });
  }
  control.router.addEventListener('change', () => { choice.router = control.router.value; render(); });
  document.getElementById('filters').addEventListener('submit', (event) => event.preventDefault());
  document.getElementById('filters').addEventListener('reset', (event) => {
    event.preventDefault();
    Object.assign(choice, { module: null, layer: null, task: null, part: 'all' });
    Object.assign(view, { all: false, expert: null });
    render();
  });
}

function showControls() {
  const shown = matching();
  if (shown.length && !shown.includes(detail())) choice.router = shown[0].name;
  const place = (items, value) => (value === null ? EVERY : String(items.indexOf(value)));
  control.module.value = place(modules, choice.module);
  control.layer.value = place(layers, choice.layer);
  control.task.value = place(tasks, choice.task);
  options(control.router, (shown.length ? shown : [detail()]).map((router) => [router.name, routerName(router)]));
  control.router.value = choice.router;
  const words = shown.length ? `${shown.length} of ${routers.length} routers` : 'No router matches';
  document.getElementById('shown').textContent = `${words}; in detail: ${routerName(detail())}.`;
}

// Redraws keep the focus where it was, and what was open open.
function render() {
  const active = document.activeElement;
  const [key, id] = [active?.dataset?.key, active?.id];
  const open = new Set([...document.querySelectorAll('main details[open] > summary')].map((item) => `${item.closest('section').id}:${item.textContent}`));
  showControls();
  for (const [name, build] of Object.entries(SECTIONS)) bodyOf(name).replaceChildren(...build());
  for (const item of document.querySelectorAll('main details > summary')) {
    if (open.has(`${item.closest('section').id}:${item.textContent}`)) item.parentElement.open = true;
  }
  const again = key ? document.querySelector(`[data-key="${CSS.escape(key)}"]`) : id && document.getElementById(id);
  if (again && again !== document.activeElement) again.focus({ preventScroll: true });
}

function focusOn(router) {
  Object.assign(choice, { module: router.module, layer: router.layer, router: router.name });
  render();
  document.getElementById('load').scrollIntoView();
  control.router.focus({ preventScroll: true });
}

facts();
bodyOf('summary').replaceChildren(...summary());
bodyOf('terms').replaceChildren(...termsSection());
fillControls();
if (innerWidth <= 640 && modules.length > 2) [choice.module] = modules; // maps of every module are long on a phone
render();

let width = innerWidth;
let timer = 0;
addEventListener('resize', () => {
  clearTimeout(timer);
  timer = setTimeout(() => { if (innerWidth !== width) { width = innerWidth; render(); } }, 150);
});
addEventListener('scroll', hideTip, { passive: true });
darkScheme.addEventListener('change', render);
