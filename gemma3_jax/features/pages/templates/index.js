const query = document.getElementById('query'), body = document.querySelector('#features tbody');
// Of a row: itself, the feature's number, and what a search looks at: number, label and tokens.
const rows = [...body.rows].map(row => {
  const cells = [...row.cells].filter((cell, i) => !i || !cell.matches('.number'));
  return [row, row.cells[0].textContent, cells.map(cell => cell.textContent).join(' ').toLowerCase()];
});
function search() {
  const words = query.value.toLowerCase().split(/\s+/).filter(Boolean);
  let shown = 0;
  for (const [row, , text] of rows) {
    row.hidden = !words.every(word => text.includes(word));
    shown += !row.hidden;
  }
  document.getElementById('count').textContent = shown + ' of ' + rows.length;
}
// Enter opens the feature of that number, or the first one that is shown.
function open() {
  const exact = rows.find(([, name]) => name == query.value.trim());
  const row = exact ? exact[0] : [...body.rows].find(row => !row.hidden);
  row?.querySelector('a').click();
}
function sort(head) {
  const now = head.getAttribute('aria-sort') ?? head.dataset.before;
  const sign = now == 'ascending' ? -1 : 1, column = head.cellIndex;
  for (const other of head.parentElement.cells) other.removeAttribute('aria-sort');
  head.setAttribute('aria-sort', sign > 0 ? 'ascending' : 'descending');
  const value = cell => 'value' in cell.dataset ? +cell.dataset.value : cell.textContent.toLowerCase();
  const keyed = rows.map(([row]) => [value(row.cells[column]), row]);
  keyed.sort(([a], [b]) => sign * (a < b ? -1 : a > b ? 1 : 0));
  body.append(...keyed.map(([, row]) => row));
}
query.addEventListener('input', search);
query.addEventListener('keydown', event => event.key == 'Enter' && open());
for (const head of document.querySelectorAll('th[data-sort]')) head.addEventListener('click', () => sort(head));
search();
