
(() => {
  const data = JSON.parse(document.getElementById("data").textContent);
  const bytes = Uint8Array.from(atob(data.weights), (c) => c.charCodeAt(0));
  const n = data.tokens.length, size = (n * (n + 1)) / 2;
  const layer = document.getElementById("layer"), head = document.getElementById("head");
  const map = document.getElementById("map"), context = map.getContext("2d");
  let query = -1;

  /* The bytes of the chosen head for one query: the square roots of its weights, in multiples of 1/255. */
  function row(i) {
    const first = (Number(layer.value) * data.heads.length + Number(head.value)) * size + (i * (i + 1)) / 2;
    return bytes.subarray(first, first + i + 1);
  }

  function show(i) {
    const roots = row(i);
    query = i;
    text.tokens.forEach((token, j) => {
      if (j <= i) token.style.setProperty("--root", (roots[j] / 255).toFixed(3));
      else token.style.removeProperty("--root");
      token.classList.toggle("later", j > i);
    });
    const order = Array.from(roots.keys()).sort((a, b) => roots[b] - roots[a] || b - a).slice(0, 8);
    document.getElementById("query").replaceChildren(
      make("strong", "", nameOf(text.tokens[i])),
      document.createTextNode(" (token " + i + ", layer " + where(layer) + ", head " + where(head) + ") attends to"),
    );
    document.getElementById("strongest").replaceChildren(...order.map((j) => {
      const weight = (roots[j] / 255) ** 2, item = document.createElement("li"), bar = make("span", "bar", "");
      bar.style.width = (100 * weight).toFixed(1) + "%";
      bar.setAttribute("aria-hidden", "true");
      item.append(make("code", "", nameOf(text.tokens[j])), make("span", "muted", " token " + j + " "),
        make("span", "number", percent(weight)), bar);
      return item;
    }));
    draw();
  }

  function where(select) {
    return select.options[select.selectedIndex].textContent;
  }

  function colour(name) {
    return getComputedStyle(document.documentElement).getPropertyValue(name).trim();
  }

  function draw() {
    const image = context.createImageData(n, n), [red, green, blue] = colour("--heat").split(" ").map(Number);
    for (let i = 0; i < n; i++) {
      row(i).forEach((root, j) => image.data.set([red, green, blue, root], 4 * (i * n + j)));
    }
    context.putImageData(image, 0, 0);
    context.fillStyle = colour("--muted");
    if (query + 1 < n) context.fillRect(query + 1, query, Math.max(1, n / 40), 1);
    map.setAttribute("aria-label", "map of layer " + where(layer) + ", head " + where(head) + ": " + n + " rows");
  }

  function move(select, by) {
    const to = select.selectedIndex + by;
    if (to < 0 || to >= select.options.length) return;
    select.selectedIndex = to;
    show(query);
  }

  map.width = map.height = n;
  const text = chooser(document.querySelector(".text"), show);
  layer.addEventListener("change", () => show(query));
  head.addEventListener("change", () => show(query));
  document.querySelector(".text").addEventListener("keydown", (event) => {
    const by = { ArrowUp: [head, -1], ArrowDown: [head, 1], PageUp: [layer, -1], PageDown: [layer, 1] }[event.key];
    if (!by || event.altKey || event.ctrlKey || event.metaKey) return;
    event.preventDefault();
    move(...by);
  });
  for (const kind of ["pointermove", "click"]) {
    map.addEventListener(kind, (event) => {
      const box = map.getBoundingClientRect();
      text.choose(Math.min(n - 1, Math.floor(((event.clientY - box.top) / box.height) * n)), false);
    });
  }
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", draw);
  text.choose(n - 1, false);
})();
