// The page: light and dark, one dataset at a time, commands to copy, where the reader is, all open on paper.
const root = document.documentElement, theme = document.getElementById('theme');
const systemDark = matchMedia('(prefers-color-scheme: dark)');
const remember = name => { try { localStorage.setItem('coop-theme', name); } catch { /* a file may have no storage */ } };
const remembered = () => { try { return localStorage.getItem('coop-theme'); } catch { return null; } };
const isDark = () => (root.dataset.theme || (systemDark.matches ? 'dark' : 'light')) === 'dark';
const name = () => { theme.textContent = isDark() ? 'Light' : 'Dark'; theme.setAttribute('aria-label', `Switch to ${isDark() ? 'light' : 'dark'} colours`); };
if (['light', 'dark'].includes(remembered())) root.dataset.theme = remembered();
theme.hidden = false;
name();
systemDark.addEventListener('change', name);
theme.addEventListener('click', () => {
  root.dataset.theme = isDark() ? 'light' : 'dark';
  remember(root.dataset.theme);
  name();
});

for (const choose of document.querySelectorAll('.choose')) {
  const select = choose.querySelector('select'), all = choose.querySelector('button');
  const choices = [...choose.nextElementSibling.children];
  choices.forEach(choice => make('option', choice.dataset.name, select));
  const update = () => {
    const every = all.getAttribute('aria-pressed') === 'true';
    select.disabled = every;
    choices.forEach((choice, index) => { choice.hidden = !every && index !== select.selectedIndex; });
  };
  select.addEventListener('change', update);
  all.addEventListener('click', () => { all.setAttribute('aria-pressed', all.getAttribute('aria-pressed') !== 'true'); update(); });
  choose.hidden = false;
  update();
}

for (const button of document.querySelectorAll('.copy')) {
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

const links = new Map([...document.querySelectorAll('#contents a')].map(link => [link.hash.slice(1), link]));
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
  closed = [...document.querySelectorAll('details:not([open])')];
  closed.forEach(details => { details.open = true; });
});
addEventListener('afterprint', () => closed.forEach(details => { details.open = false; }));
