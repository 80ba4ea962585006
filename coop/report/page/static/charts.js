// Charts: the nearest point is told on hover, arrow keys walk from point to point, the legend hides series.
function pointTitle(point) {
  const series = point.closest('[data-label]'), chart = point.closest('svg');
  if (!series) return point.getAttribute('aria-label');
  return `${chart.dataset.title} · ${series.dataset.label} · ${chart.dataset.x} ${point.dataset.at}`;
}
const visible = chart => [...chart.querySelectorAll('.pt')].filter(point => !point.closest('[hidden]'));
const centre = point => { const box = point.getBoundingClientRect(); return [box.x + box.width / 2, box.y + box.height / 2]; };
let shown = null;
function show(point) {
  if (shown) shown.classList.remove('on');
  shown = point;
  if (!point) return hideTip();
  point.classList.add('on');
  showTip(point, pointTitle(point));
}
function nearest(chart, x, y) {
  let best = null, least = 40 ** 2;
  for (const point of visible(chart)) {
    const [px, py] = centre(point), distance = (px - x) ** 2 + (py - y) ** 2;
    if (distance < least) [best, least] = [point, distance];
  }
  return best;
}
function walk(chart, point, key) {
  const points = visible(chart), at = points.indexOf(point);
  const step = { ArrowRight: 1, ArrowDown: 1, ArrowLeft: -1, ArrowUp: -1 }[key];
  if (chart.dataset.roving === 'list') return key === 'Home' ? points[0] : key === 'End' ? points.at(-1) : points[at + step];
  const series = points.filter(one => one.parentElement === point.parentElement).sort((a, b) => centre(a)[0] - centre(b)[0]);
  if (key === 'Home') return series[0];
  if (key === 'End') return series.at(-1);
  const [x] = centre(point);
  if (key === 'ArrowRight' || key === 'ArrowLeft') {
    const along = series[series.indexOf(point) + step];
    if (along) return along;
    const beyond = points.filter(one => (centre(one)[0] - x) * step > 1);
    return beyond.sort((a, b) => Math.abs(centre(a)[0] - x) - Math.abs(centre(b)[0] - x))[0];
  }
  const column = points.filter(one => Math.abs(centre(one)[0] - x) < 1).sort((a, b) => centre(a)[1] - centre(b)[1]);
  return column[column.indexOf(point) + step];
}
for (const chart of document.querySelectorAll('svg.chart, svg[data-roving]')) {
  const points = visible(chart);
  if (points.length) points[0].setAttribute('tabindex', '0');
  chart.addEventListener('pointermove', event => show(nearest(chart, event.clientX, event.clientY)));
  chart.addEventListener('pointerdown', event => show(nearest(chart, event.clientX, event.clientY)));
  chart.addEventListener('pointerleave', event => { if (event.pointerType === 'mouse') show(null); });
  chart.addEventListener('click', event => {
    const point = nearest(chart, event.clientX, event.clientY);
    if (point && event.pointerType !== 'touch') showSource(point, pointTitle(point));
  });
  chart.addEventListener('focusin', event => {
    if (!event.target.matches('.pt')) return;
    chart.querySelectorAll('.pt[tabindex="0"]').forEach(point => point.setAttribute('tabindex', '-1'));
    event.target.setAttribute('tabindex', '0');
    show(event.target);
  });
  chart.addEventListener('focusout', () => show(null));
  chart.addEventListener('keydown', event => {
    const point = event.target;
    if (/^(Arrow|Home|End)/.test(event.key)) {
      event.preventDefault();
      const next = walk(chart, point, event.key);
      if (next) next.focus();
    } else if (event.key === 'Enter' || event.key === ' ') {
      event.preventDefault();
      showSource(point, pointTitle(point));
    } else if (event.key === 'Escape') show(null);
  });
}
addEventListener('scroll', () => { if (shown && document.activeElement !== shown) show(null); }, { passive: true });

for (const key of document.querySelectorAll('.legend .key')) {
  key.addEventListener('click', () => {
    const on = key.getAttribute('aria-pressed') !== 'true';
    key.setAttribute('aria-pressed', on);
    const section = key.closest('section'), pressed = new Map();
    section.querySelectorAll('.key').forEach(one => pressed.set(one.dataset.s, one.getAttribute('aria-pressed') === 'true'));
    for (const series of section.querySelectorAll('.series')) {
      const wanted = pressed.get(series.dataset.s) && (!series.classList.contains('theirs') || pressed.get('theirs'));
      series.toggleAttribute('hidden', !wanted);
    }
    for (const chart of section.querySelectorAll('svg.chart')) {
      chart.querySelectorAll('.pt[tabindex="0"]').forEach(point => point.setAttribute('tabindex', '-1'));
      const first = visible(chart)[0];
      if (first) first.setAttribute('tabindex', '0');
    }
  });
}
