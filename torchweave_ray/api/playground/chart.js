// Two charts as SVG, by hand. Shape and dashes tell the series apart, not colour alone.

const NS = "http://www.w3.org/2000/svg";
const [LEFT, BOTTOM, TOP, RIGHT] = [52, 40, 26, 14];
const STEPS = [1, 2, 2.5, 5, 10];
const WHOLE_STEPS = [1, 2, 3, 5, 10];

/** Lines of [x, y] points; `series` is [{name, points}]. */
export function lines(box, series, xLabel, yLabel) {
  const [svg, x, y] = frame(box, series, [xLabel, STEPS], [yLabel, WHOLE_STEPS]);
  for (const { name, points } of series) {
    const path = points.map(([a, b], i) => `${i ? "L" : "M"}${x(a).toFixed(1)} ${y(b).toFixed(1)}`).join("");
    svg.append(node("path", { class: `curve ${name}`, d: path || "M0 0" }));
  }
  finish(box, svg, series);
}

/** One stem for each sample, in the order in which they ended. */
export function stems(box, series, xLabel, yLabel) {
  const [svg, x, y] = frame(box, series, [xLabel, WHOLE_STEPS], [yLabel, STEPS]);
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

/** Drawn in the box's own pixels, so that its words are as large as the page's. */
function frame(box, series, [xLabel, xSteps], [yLabel, ySteps]) {
  const width = Math.max(260, box.clientWidth || 520);
  const height = Math.max(200, Math.min(280, width / 2));
  const points = series.flatMap((s) => s.points);
  const most = (index, steps) => 4 * step(Math.max(0, ...points.map((p) => p[index])) / 4, steps);
  const [mostX, mostY] = [most(0, xSteps), most(1, ySteps)];
  const x = (value) => LEFT + (value / mostX) * (width - LEFT - RIGHT);
  const y = (value) => height - BOTTOM - (value / mostY) * (height - BOTTOM - TOP);
  const svg = node("svg", { viewBox: `0 0 ${width} ${height}`, role: "img" });
  for (let i = 0; i <= 4; i++) {
    const [atX, atY] = [(mostX * i) / 4, (mostY * i) / 4];
    svg.append(
      node("line", { class: "axis", x1: LEFT, x2: width - RIGHT, y1: y(atY), y2: y(atY) }),
      node("text", { x: LEFT - 8, y: y(atY) + 4, "text-anchor": "end" }, short(atY)),
      node("text", { x: x(atX), y: height - BOTTOM + 18, "text-anchor": "middle" }, short(atX)),
    );
  }
  svg.append(node("text", { class: "unit", x: (LEFT + width - RIGHT) / 2, y: height - 4, "text-anchor": "middle" }, xLabel));
  svg.append(node("text", { class: "unit", x: LEFT, y: 12 }, yLabel));
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

/** The least round step of at least `value`. */
function step(value, steps) {
  if (!(value > 0)) return steps[0];
  const unit = 10 ** Math.floor(Math.log10(value));
  const found = steps.map((m) => m * unit).find((m) => m >= value * 0.999);
  return steps === WHOLE_STEPS ? Math.max(1, found) : found;
}

const short = (value) => (value >= 100 ? value.toFixed(0) : String(+value.toPrecision(3)));
