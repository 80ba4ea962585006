document.documentElement.classList.add('js');
const data = JSON.parse(document.getElementById('data').textContent);
const tip = document.getElementById('tip');
const dialog = document.getElementById('source');
const all = (selector, inside = document) => [...inside.querySelectorAll(selector)];

function make(name, text = '', parent = null, className = '') {
  const element = document.createElement(name);
  element.textContent = text;
  if (className) element.className = className;
  if (parent) parent.append(element);
  return element;
}

// What stands behind a number: a tip when it is pointed at, everything when it is pressed.
const number = (value, decimals = 2) => value.toFixed(decimals).replace(/^-(0\.?0*)$/, '$1').replace('-', '\u2212');
const signed = value => (Number(value.toFixed(2)) > 0 ? '+' : '') + number(value);
const mean = value => value.mean === undefined ? value.state : number(value.mean) + (value.std === undefined ? '' : ` ± ${number(value.std)}`);
const source = element => {
  const name = element.dataset.n || '', index = Number(name.slice(1));
  return { value: name[0] === 'v' ? data.values[index] : null, own: name[0] === 'p' ? data.published[index] : null };
};
function runs(value) {
  const there = value.state === 'partial' ? `${value.n} of ${value.planned} runs` : `n = ${value.n}`;
  return value.seeds ? `${there}; seed${value.seeds.length > 1 ? 's' : ''} ${value.seeds.join(', ')}` : there;
}
function publishedLine(one, value) {
  const away = one.verified && value && value.mean !== undefined ? ` (ours ${signed(value.mean - one.value)})` : '';
  return `published ${number(one.value)}${one.verified ? '' : ' UNVERIFIED'}${away}: ${one.source}${one.note ? `; ${one.note}` : ''}`;
}
const publishedOf = value => (value.published || []).map(index => data.published[index]);

function showTip(element) {
  const { value, own } = source(element), [title, ...rest] = element.getAttribute('aria-label').split(': ');
  tip.replaceChildren();
  make('strong', title, tip);
  if (value) {
    make('b', mean(value), make('p', '', tip));
    if (value.n) make('p', runs(value), tip);
    if (value.difference !== undefined) make('p', `${signed(value.difference)} to zero-shot`, tip);
    publishedOf(value).forEach(one => make('p', publishedLine(one, value), tip));
    if (value.note) make('p', value.note, tip);
  } else make('p', own ? publishedLine(own) : rest.join(': '), tip);
  tip.hidden = false;
  const box = element.getBoundingClientRect(), mine = tip.getBoundingClientRect();
  const left = Math.min(Math.max(box.x + box.width / 2 - mine.width / 2, 8), document.documentElement.clientWidth - mine.width - 8);
  const above = box.y - mine.height - 10;
  tip.style.translate = `${left}px ${above < 4 ? box.bottom + 10 : above}px`;
}

function showSource(element, title) {
  const { value, own } = source(element);
  if (!value && !own) return;
  tip.hidden = true;
  dialog.replaceChildren();
  make('h2', title, dialog).id = 'source-title';
  const close = make('button', 'Close', dialog, 'plain close');
  close.type = 'button';
  close.addEventListener('click', () => dialog.close());
  if (value) {
    make('p', mean(value), dialog, 'big');
    const facts = make('dl', '', dialog);
    const fact = (name, text) => { make('dt', name, facts); make('dd', text, facts); };
    fact('state', value.state);
    fact('runs', `${value.n || 0} of ${value.planned || 0}`);
    if (value.seeds) fact(value.seeds.length > 1 ? 'seeds' : 'seed', value.seeds.join(', '));
    if (value.difference !== undefined) fact('to zero-shot', signed(value.difference));
    if (value.note) fact('note', value.note);
    if (value.error) fact('error', value.error);
  }
  const published = value ? publishedOf(value) : [own];
  if (published.length) make('h3', 'Published', dialog);
  const theirs = make('ul', '', dialog);
  published.forEach(one => make('li', publishedLine(one, value), theirs, one.verified ? '' : 'unverified'));
  if (value && value.runs) {
    make('h3', 'From these runs, below the results folder', dialog);
    const list = make('ul', '', dialog);
    value.runs.forEach(run => make('code', data.runs[run], make('li', '', list)));
  }
  dialog.showModal();
}
dialog.addEventListener('click', event => { if (event.target === dialog) dialog.close(); });
document.addEventListener('click', event => {
  const button = event.target.closest('button.v');
  if (!button) return;
  const cell = button.closest('td'), head = cell.closest('table').tHead.rows[0].cells[cell.cellIndex];
  const names = all('th', cell.parentElement).map(th => th.textContent);
  showSource(button, [...names, head.querySelector('button').textContent].join(' · '));
});

// Charts: the nearest point has its tip, arrow keys move from point to point, the legend hides series.
const visible = chart => all('.pt', chart).filter(point => !point.hasAttribute('hidden'));
const centre = point => { const box = point.getBoundingClientRect(); return [box.x + box.width / 2, box.y + box.height / 2]; };
let current = null;
function show(point) {
  if (current) current.classList.remove('on');
  current = point;
  if (!point) { tip.hidden = true; return; }
  point.classList.add('on');
  showTip(point);
}
function nearest(chart, event) {
  const under = event.target.closest('.pt');
  if (under) return under;
  let best = null, least = 40 ** 2;
  for (const point of visible(chart)) {
    const [x, y] = centre(point), distance = (x - event.clientX) ** 2 + (y - event.clientY) ** 2;
    if (distance < least) [best, least] = [point, distance];
  }
  return best;
}
function next(chart, point, key) {
  const points = visible(chart), step = { ArrowRight: 1, ArrowDown: 1, ArrowLeft: -1, ArrowUp: -1 }[key];
  if (chart.classList.contains('list')) {
    return key === 'Home' ? points[0] : key === 'End' ? points.at(-1) : points[points.indexOf(point) + step];
  }
  const series = points.filter(one => one.dataset.s === point.dataset.s && ('theirs' in one.dataset) === ('theirs' in point.dataset));
  series.sort((a, b) => centre(a)[0] - centre(b)[0]);
  if (key === 'Home') return series[0];
  if (key === 'End') return series.at(-1);
  const [x] = centre(point);
  if (key === 'ArrowRight' || key === 'ArrowLeft') {
    const along = series[series.indexOf(point) + step];
    if (along) return along;
    const beyond = points.filter(one => (centre(one)[0] - x) * step > 1);
    return beyond.sort((a, b) => Math.abs(centre(a)[0] - x) - Math.abs(centre(b)[0] - x))[0];
  }
  const column = points.filter(one => Math.abs(centre(one)[0] - x) < 2).sort((a, b) => centre(a)[1] - centre(b)[1]);
  return column[column.indexOf(point) + step];
}
function focusFirst(chart) {
  all('.pt[tabindex="0"]', chart).forEach(point => point.setAttribute('tabindex', '-1'));
  const first = visible(chart)[0];
  if (first) first.setAttribute('tabindex', '0');
}
for (const chart of all('svg.chart[role="group"]')) {
  focusFirst(chart);
  chart.addEventListener('pointermove', event => show(nearest(chart, event)));
  chart.addEventListener('pointerdown', event => show(nearest(chart, event)));
  chart.addEventListener('pointerleave', event => { if (event.pointerType === 'mouse') show(null); });
  chart.addEventListener('click', event => {
    const point = nearest(chart, event);
    if (point && event.pointerType !== 'touch') showSource(point, point.getAttribute('aria-label').split(': ')[0]);
  });
  chart.addEventListener('focusin', event => {
    if (!event.target.matches('.pt')) return;
    all('.pt[tabindex="0"]', chart).forEach(point => point.setAttribute('tabindex', '-1'));
    event.target.setAttribute('tabindex', '0');
    show(event.target);
  });
  chart.addEventListener('focusout', () => show(null));
  chart.addEventListener('keydown', event => {
    if (/^(Arrow|Home|End)/.test(event.key)) {
      event.preventDefault();
      const target = next(chart, event.target, event.key);
      if (target) target.focus();
    } else if (event.key === 'Enter' || event.key === ' ') {
      event.preventDefault();
      showSource(event.target, event.target.getAttribute('aria-label').split(': ')[0]);
    } else if (event.key === 'Escape') show(null);
  });
}
addEventListener('scroll', () => { if (current && document.activeElement !== current) show(null); }, { passive: true });

for (const key of all('.legend .key')) {
  key.addEventListener('click', () => {
    key.setAttribute('aria-pressed', key.getAttribute('aria-pressed') !== 'true');
    const section = key.closest('section'), on = new Map();
    all('.key', section).forEach(one => on.set(one.dataset.s, one.getAttribute('aria-pressed') === 'true'));
    for (const mark of all('[data-s]:not(.key)', section)) {
      mark.toggleAttribute('hidden', !on.get(mark.dataset.s) || ('theirs' in mark.dataset && !on.get('theirs')));
    }
    all('svg.chart[role="group"]', section).forEach(focusFirst);
  });
}

// Tables: sorted by the column that is pressed, missing values last; filtered by words.
const collator = new Intl.Collator(undefined, { numeric: true, sensitivity: 'base' });
function sortKey(cell) {
  if (cell.tagName === 'TD') return cell.dataset.mean === undefined ? null : Number(cell.dataset.mean);
  const text = cell.textContent.trim();
  return text !== '' && Number.isFinite(Number(text)) ? Number(text) : text;
}
const compare = (a, b) => typeof a === 'number' && typeof b === 'number' ? a - b : collator.compare(String(a), String(b));
for (const table of all('table.sortable')) {
  const body = table.tBodies[0], original = [...body.rows], grouped = table.classList.contains('grouped');
  const heads = [...table.tHead.rows[0].cells];
  heads.forEach((head, column) => head.querySelector('button').addEventListener('click', () => {
    const numbers = original.some(row => row.cells[column].dataset.mean !== undefined);
    const order = numbers ? ['none', 'descending', 'ascending'] : ['none', 'ascending', 'descending'];
    const wanted = order[(order.indexOf(head.getAttribute('aria-sort')) + 1) % 3];
    heads.forEach(one => one.setAttribute('aria-sort', one === head ? wanted : 'none'));
    const sign = wanted === 'descending' ? -1 : 1;
    const keyed = (wanted === 'none' ? original : [...body.rows]).map(row => [sortKey(row.cells[column]), row]);
    if (wanted !== 'none') keyed.sort(([a], [b]) => a === null || b === null ? (a === null) - (b === null) : sign * compare(a, b));
    body.append(...keyed.map(([, row]) => row));
    table.classList.toggle('grouped', grouped && wanted === 'none');
  }));
}
for (const filter of all('.filter')) {
  const input = filter.querySelector('input'), output = filter.querySelector('output');
  const table = filter.parentElement.querySelector('table'), rows = [...table.tBodies[0].rows];
  const texts = rows.map(row => all('th', row).map(th => th.textContent).join(' ').toLowerCase());
  const grouped = table.classList.contains('grouped');
  filter.hidden = false;
  input.addEventListener('input', () => {
    const words = input.value.toLowerCase().split(/\s+/).filter(Boolean);
    let count = 0;
    rows.forEach((row, index) => {
      row.hidden = !words.every(word => texts[index].includes(word));
      count += !row.hidden;
    });
    const sorted = table.querySelector('[aria-sort="ascending"], [aria-sort="descending"]');
    table.classList.toggle('grouped', grouped && !words.length && !sorted);
    output.textContent = words.length ? `${count} of ${rows.length} rows` : '';
  });
}
const sideways = new ResizeObserver(entries => entries.forEach(({ target }) => {
  target.previousElementSibling.hidden = target.scrollWidth <= target.clientWidth + 1;
}));
for (const scroll of all('.scroll')) {
  const note = make('p', 'The table is wider than the page: scroll it sideways.', null, 'sideways note');
  note.hidden = true;
  scroll.before(note);
  sideways.observe(scroll);
}

// The page: light and dark, one dataset at a time, commands to copy, where the reader is, all open on paper.
const root = document.documentElement, theme = document.getElementById('theme');
const systemDark = matchMedia('(prefers-color-scheme: dark)');
const remember = name => { try { localStorage.setItem('coop-theme', name); } catch { /* a file may have no storage */ } };
const remembered = () => { try { return localStorage.getItem('coop-theme'); } catch { return null; } };
const isDark = () => (root.dataset.theme || (systemDark.matches ? 'dark' : 'light')) === 'dark';
const nameTheme = () => {
  theme.textContent = isDark() ? 'Light' : 'Dark';
  theme.setAttribute('aria-label', `Switch to ${isDark() ? 'light' : 'dark'} colours`);
};
if (['light', 'dark'].includes(remembered())) root.dataset.theme = remembered();
theme.hidden = false;
nameTheme();
systemDark.addEventListener('change', nameTheme);
theme.addEventListener('click', () => {
  root.dataset.theme = isDark() ? 'light' : 'dark';
  remember(root.dataset.theme);
  nameTheme();
});

for (const choose of all('.choose')) {
  const select = choose.querySelector('select'), every = choose.querySelector('button');
  const choices = [...choose.nextElementSibling.children];
  choices.forEach(choice => make('option', choice.dataset.name, select));
  const update = () => {
    const shown = every.getAttribute('aria-pressed') === 'true';
    select.disabled = shown;
    choices.forEach((choice, index) => { choice.hidden = !shown && index !== select.selectedIndex; });
  };
  select.addEventListener('change', update);
  every.addEventListener('click', () => { every.setAttribute('aria-pressed', every.getAttribute('aria-pressed') !== 'true'); update(); });
  choose.hidden = false;
  update();
}

for (const button of all('.copy')) {
  const code = button.parentElement.querySelector('code');
  button.hidden = false;
  button.addEventListener('click', async () => {
    try {
      await navigator.clipboard.writeText(code.textContent);
      button.textContent = 'Copied';
    } catch {
      getSelection().selectAllChildren(code);
      button.textContent = 'Selected';
    }
    setTimeout(() => { button.textContent = 'Copy'; }, 1500);
  });
}

const links = new Map(all('#contents a').map(link => [link.hash.slice(1), link]));
const seen = new IntersectionObserver(entries => {
  for (const entry of entries) {
    if (!entry.isIntersecting) continue;
    links.forEach(link => link.removeAttribute('aria-current'));
    links.get(entry.target.id).setAttribute('aria-current', 'true');
  }
}, { rootMargin: '-20% 0px -70% 0px' });
links.forEach((_, id) => seen.observe(document.getElementById(id)));

let closed = [];
addEventListener('beforeprint', () => {
  closed = all('details:not([open])');
  closed.forEach(details => { details.open = true; });
});
addEventListener('afterprint', () => closed.forEach(details => { details.open = false; }));
