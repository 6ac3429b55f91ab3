// The value under the pointer, for each chart over steps. The page says everything without it too.

for (const plot of document.querySelectorAll(".plot[data-x]")) {
  const [last, perEpoch] = plot.dataset.x.split(" ").map(Number);
  const [low, high, log] = plot.dataset.y.split(" ").map(Number);
  const output = plot.parentElement.querySelector("output");
  const now = output.textContent;
  const svg = plot.firstElementChild;
  const lines = [...plot.querySelectorAll(".curve")].map((path) => ({
    name: path.dataset.name,
    points: path.getAttribute("d").slice(1).split("L").map((point) => point.split(" ").map(Number)),
  }));
  const cursor = document.createElementNS("http://www.w3.org/2000/svg", "line");
  cursor.setAttribute("class", "cursor");
  cursor.setAttribute("y2", "100%");

  const value = (y) => {
    const share = 1 - y / 1000;
    return log ? low * (high / low) ** share : low + share * (high - low);
  };
  const nearest = (points, x) => points.reduce((a, b) => (Math.abs(b[0] - x) < Math.abs(a[0] - x) ? b : a));

  plot.addEventListener("pointermove", (event) => {
    const box = svg.getBoundingClientRect();
    const near = lines.map(({ points }) => nearest(points, (1000 * (event.clientX - box.left)) / box.width));
    const x = near.at(-1)[0];
    const step = Math.round((x / 1000) * last);
    const when = perEpoch ? `epoch ${(step / perEpoch).toPrecision(3)}` : `step ${step}`;
    const values = near.map(([, y], i) => `${lines[i].name} ${+value(y).toPrecision(4)}`.trim());
    output.textContent = [when, ...values].join(" · ");
    cursor.setAttribute("x1", `${x / 10}%`);
    cursor.setAttribute("x2", `${x / 10}%`);
    svg.append(cursor);
  });
  plot.addEventListener("pointerleave", () => {
    output.textContent = now;
    cursor.remove();
  });
}

document.getElementById("written").textContent = `written ${new Date(document.lastModified).toLocaleString()}`;
