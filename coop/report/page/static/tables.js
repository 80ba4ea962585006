// Tables: sorted by the column that is pressed, missing values last; filtered by words.
const collator = new Intl.Collator(undefined, { numeric: true, sensitivity: 'base' });

function sortKey(cell) {
  if (cell.tagName === 'TD') return cell.dataset.n === undefined ? null : Number(cell.dataset.n);
  const text = cell.textContent.trim();
  return text !== '' && Number.isFinite(Number(text)) ? Number(text) : text;
}
function compare(a, b) {
  return typeof a === 'number' && typeof b === 'number' ? a - b : collator.compare(String(a), String(b));
}
for (const table of document.querySelectorAll('table.sortable')) {
  const body = table.tBodies[0], original = [...body.rows], grouped = table.classList.contains('grouped');
  const heads = [...table.tHead.rows[0].cells];
  heads.forEach((head, column) => head.querySelector('button').addEventListener('click', () => {
    const numbers = original.some(row => row.cells[column].dataset.n !== undefined);
    const order = numbers ? ['none', 'descending', 'ascending'] : ['none', 'ascending', 'descending'];
    const next = order[(order.indexOf(head.getAttribute('aria-sort')) + 1) % 3];
    heads.forEach(one => one.setAttribute('aria-sort', one === head ? next : 'none'));
    const sign = next === 'descending' ? -1 : 1;
    const keyed = (next === 'none' ? original : [...body.rows]).map(row => [sortKey(row.cells[column]), row]);
    if (next !== 'none') keyed.sort(([a], [b]) => a === null || b === null ? (a === null) - (b === null) : sign * compare(a, b));
    body.append(...keyed.map(([, row]) => row));
    table.classList.toggle('grouped', grouped && next === 'none');
  }));
}
for (const filter of document.querySelectorAll('.filter')) {
  const input = filter.querySelector('input'), output = filter.querySelector('output');
  const table = filter.parentElement.querySelector('table'), rows = [...table.tBodies[0].rows];
  const texts = rows.map(row => [...row.querySelectorAll('th')].map(th => th.textContent).join(' ').toLowerCase());
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
