// What stands behind a number: told in a tip when it is pointed at, and in full when it is pressed.
document.documentElement.classList.add('js');
const data = JSON.parse(document.getElementById('data').textContent);
const tip = document.getElementById('tip');
const dialog = document.getElementById('source');

function make(name, text = '', parent = null, className = '') {
  const element = document.createElement(name);
  element.textContent = text;
  if (className) element.className = className;
  if (parent) parent.append(element);
  return element;
}
const number = (value, decimals = 2) => value.toFixed(decimals).replace(/^-(0\.?0*)$/, '$1').replace('-', '\u2212');
const signed = value => (Number(value.toFixed(2)) > 0 ? '+' : '') + number(value);
const spread = value => value.std !== undefined && value.n > 1 ? ` ± ${number(value.std)}` : '';
const mean = value => value.mean === undefined ? value.state : number(value.mean) + spread(value);

function runs(value) {
  const there = value.state === 'partial' ? `${value.n} of ${value.planned} runs` : `n = ${value.n}`;
  return value.seeds ? `${there}; seed${value.seeds.length > 1 ? 's' : ''} ${value.seeds.join(', ')}` : there;
}
function publishedLine(one, value) {
  const away = one.verified && value && value.mean !== undefined ? ` (ours ${signed(value.mean - one.value)})` : '';
  return `published ${number(one.value)}${one.verified ? '' : ' UNVERIFIED'}${away}: ${one.source}${one.note ? `; ${one.note}` : ''}`;
}
const publishedOf = value => (value.published || []).map(index => data.published[index]);

function showTip(element, title) {
  tip.replaceChildren();
  const { v, p } = element.dataset;
  make('strong', title, tip);
  if (v !== undefined) {
    const value = data.values[v];
    make('b', mean(value), make('p', '', tip));
    if (value.n) make('p', runs(value), tip);
    if (value.difference !== undefined) make('p', `${signed(value.difference)} to zero-shot`, tip);
    publishedOf(value).forEach(one => make('p', publishedLine(one, value), tip));
    if (value.note) make('p', value.note, tip);
  } else if (p !== undefined) make('p', publishedLine(data.published[p]), tip);
  tip.hidden = false;
  const box = element.getBoundingClientRect(), own = tip.getBoundingClientRect();
  const left = Math.min(Math.max(box.x + box.width / 2 - own.width / 2, 8), document.documentElement.clientWidth - own.width - 8);
  const above = box.y - own.height - 10;
  tip.style.translate = `${left}px ${above < 4 ? box.bottom + 10 : above}px`;
}
function hideTip() { tip.hidden = true; }

function showSource(element, title) {
  const { v, p } = element.dataset;
  if (v === undefined && p === undefined) return;
  hideTip();
  dialog.replaceChildren();
  make('h2', title, dialog).id = 'source-title';
  const close = make('button', 'Close', dialog, 'plain close');
  close.type = 'button';
  close.addEventListener('click', () => dialog.close());
  const value = v === undefined ? null : data.values[v];
  const published = value ? publishedOf(value) : [data.published[p]];
  if (value) {
    make('p', mean(value), dialog, 'big');
    const facts = make('dl', '', dialog);
    const fact = (name, text) => { make('dt', name, facts); make('dd', text, facts); };
    fact('state', value.state);
    fact('runs', `${value.n} of ${value.planned}`);
    if (value.seeds) fact(value.seeds.length > 1 ? 'seeds' : 'seed', value.seeds.join(', '));
    if (value.difference !== undefined) fact('to zero-shot', signed(value.difference));
    if (value.note) fact('note', value.note);
    if (value.error) fact('error', value.error);
  }
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

function cellTitle(button) {
  if (button.dataset.what) return button.dataset.what;
  const cell = button.closest('td');
  const head = cell.closest('table').tHead.rows[0].cells[cell.cellIndex].querySelector('button').textContent;
  return [...cell.parentElement.querySelectorAll('th')].map(th => th.textContent).concat(head).join(' · ');
}
document.addEventListener('click', event => {
  const button = event.target.closest('button.v');
  if (button) showSource(button, cellTitle(button));
});
