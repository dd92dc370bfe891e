// Two charts as SVG, by hand. Shape and dashes tell the series apart, not colour alone.

const NS = "http://www.w3.org/2000/svg";
const [WIDTH, HEIGHT, LEFT, BOTTOM, TOP, RIGHT] = [520, 260, 48, 34, 12, 12];

/** Lines of [x, y] points; `series` is [{name, points}]. */
export function lines(box, series, xLabel, yLabel) {
  const [svg, x, y] = frame(series.flatMap((s) => s.points), xLabel, yLabel);
  for (const { name, points } of series) {
    const path = points.map(([a, b], i) => `${i ? "L" : "M"}${x(a).toFixed(1)} ${y(b).toFixed(1)}`).join("");
    svg.append(node("path", { class: `curve ${name}`, d: path || "M0 0" }));
  }
  finish(box, svg, series);
}

/** One stem for each sample, in the order in which they ended. */
export function stems(box, series, xLabel, yLabel) {
  const [svg, x, y] = frame(series.flatMap((s) => s.points), xLabel, yLabel);
  series.forEach(({ name, points }, shift) => {
    const group = node("g", { class: `sample ${name}` });
    for (const [a, b] of points) {
      const at = x(a) + shift * 6 - 3;
      group.append(node("line", { x1: at, x2: at, y1: y(0), y2: y(b) }), shift
        ? node("rect", { class: `mark ${name}`, x: at - 4, y: y(b) - 4, width: 8, height: 8 })
        : node("circle", { class: `mark ${name}`, cx: at, cy: y(b), r: 4 }));
    }
    svg.append(group);
  });
  finish(box, svg, series);
}

function frame(points, xLabel, yLabel) {
  const most = (index) => nice(Math.max(0, ...points.map((p) => p[index])) || 1);
  const [mostX, mostY] = [most(0), most(1)];
  const x = (value) => LEFT + (value / mostX) * (WIDTH - LEFT - RIGHT);
  const y = (value) => HEIGHT - BOTTOM - (value / mostY) * (HEIGHT - BOTTOM - TOP);
  const svg = node("svg", { viewBox: `0 0 ${WIDTH} ${HEIGHT}`, role: "img" });
  for (let i = 0; i <= 4; i++) {
    const [atX, atY] = [(mostX * i) / 4, (mostY * i) / 4];
    svg.append(
      node("line", { class: "axis", x1: LEFT, x2: WIDTH - RIGHT, y1: y(atY), y2: y(atY) }),
      node("text", { x: LEFT - 6, y: y(atY) + 4, "text-anchor": "end" }, short(atY)),
      node("text", { x: x(atX), y: HEIGHT - BOTTOM + 16, "text-anchor": i === 4 ? "end" : "middle" }, short(atX)),
    );
  }
  svg.append(node("text", { x: WIDTH - RIGHT, y: HEIGHT - 3, "text-anchor": "end" }, xLabel));
  svg.append(node("text", { x: LEFT + 6, y: TOP + 12 }, yLabel));
  return [svg, x, y];
}

function finish(box, svg, series) {
  const said = series.map(({ name, points }) => `${name}: ${points.length} points, ends at ${short(points.at(-1)?.[1] ?? 0)}`);
  svg.setAttribute("aria-label", said.join("; "));
  box.replaceChildren(svg);
}

function node(name, attributes, text = "") {
  const made = document.createElementNS(NS, name);
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  made.textContent = text;
  return made;
}

function nice(value) {
  const unit = 10 ** Math.floor(Math.log10(value));
  return [1, 2, 4, 6, 8, 10].map((m) => m * unit).find((m) => m >= value * 0.999);
}

const short = (value) => (value >= 100 ? value.toFixed(0) : String(+value.toPrecision(2)));
