const MOST = 500, spans = [...document.getElementById('tokens').children], body = document.querySelector('#rows tbody');
const query = document.getElementById('query'), heads = [...document.querySelectorAll('th[data-column]')];
const rows = data.rows.map(([position, at, value]) => {
  const {name, label, link} = data.features[at], token = data.tokens[position];
  return {position, at, value, token, name, label, link, feature: at, text: `${name} ${token} ${label}`.toLowerCase()};
});
const rounded = value => String(+value.toPrecision(4));
let position = null, feature = null, column = 'value', sign = -1;

function shown() {
  const words = query.value.toLowerCase().split(/\s+/).filter(Boolean);
  const found = rows.filter(row => (position === null || row.position == position)
    && (feature === null || row.at == feature) && words.every(word => row.text.includes(word)));
  const compare = (a, b) => a[column] < b[column] ? -1 : a[column] > b[column] ? 1 : 0;
  return found.sort((a, b) => sign * compare(a, b) || b.value - a.value);
}
function cell(row, text, name = '') {
  const made = row.insertCell();
  made.textContent = text;
  made.className = name;
  return made;
}
function fill() {
  const found = shown();
  body.replaceChildren();
  for (const each of found.slice(0, MOST)) {
    const row = body.insertRow();
    row.dataset.feature = each.at;
    cell(row, rounded(each.value), 'number');
    const named = cell(row, each.name + ' ', 'number');
    if (each.link) named.append(Object.assign(document.createElement('a'), {href: each.link, rel: 'noreferrer', textContent: '↗'}));
    cell(row, each.position, 'number');
    cell(row, each.token, 'token');
    if (data.labelled) cell(row, each.label);
  }
  const some = found.length > MOST ? `the first ${MOST} of ` : '';
  document.getElementById('count').textContent = `${some}${found.length} of ${rows.length}`;
  colour();
}
function colour() {
  const values = new Map(rows.filter(row => row.at == feature).map(row => [row.position, row.value]));
  const most = Math.max(...values.values());
  spans.forEach((span, i) => {
    const step = Math.round(Math.max(values.get(i) / most, 0) * (data.colours.length - 1));
    const [back, ink] = values.has(i) ? data.colours[step] : ['', ''];
    span.style.background = back;
    span.style.color = ink;
    span.classList.toggle('at', i === position);
    if (!span.classList.contains('left-out')) span.title = values.has(i) ? rounded(values.get(i)) : feature === null ? '' : '0';
  });
}
query.addEventListener('input', fill);
document.getElementById('all').addEventListener('click', () => { position = feature = null; query.value = ''; fill(); });
document.getElementById('tokens').addEventListener('click', event => {
  const at = +event.target.dataset.position;
  if (Number.isNaN(at)) return;
  position = position === at ? null : at;
  feature = null;
  fill();
});
body.addEventListener('click', event => {
  const row = event.target.closest('tr');
  if (!row || event.target.matches('a')) return;
  feature = feature === +row.dataset.feature ? null : +row.dataset.feature;
  position = null;
  fill();
});
for (const head of heads) head.addEventListener('click', () => {
  sign = column == head.dataset.column ? -sign : head.dataset.column == 'value' ? -1 : 1;
  column = head.dataset.column;
  for (const each of heads) each.removeAttribute('aria-sort');
  head.setAttribute('aria-sort', sign > 0 ? 'ascending' : 'descending');
  fill();
});
fill();
