// The switch between the versions of the site. Beside the folder of each version lies versions.json;
// where it does not, as in a build on one's own disk, there is nothing to switch and no switch.
document.addEventListener("DOMContentLoaded", async () => {
  const label = document.querySelector(".sidebar-versions");
  const root = new URL(document.documentElement.dataset.content_root ?? ".", location);
  const above = new URL("..", root);
  const versions = await fetch(new URL("versions.json", above))
    .then((answer) => (answer.ok ? answer.json() : []))
    .catch(() => []);
  if (!label || versions.length === 0) return;
  const select = label.querySelector("select");
  const current = root.pathname.slice(above.pathname.length, -1);
  select.append(...versions.map((name) => new Option(name, name, name === current, name === current)));
  label.hidden = false;
  select.addEventListener("change", async () => {
    const start = new URL(`${select.value}/`, above);
    const page = new URL(location.pathname.slice(root.pathname.length), start);
    const exists = await fetch(page, { method: "HEAD" }).then((answer) => answer.ok, () => false);
    location = exists ? page : start;
  });
});
