// Markdown as nodes. Text goes in by createTextNode only, so an answer can never be markup.

const INLINE = /`([^`]+)`|\*\*([^*]+)\*\*|\*([^*\s][^*]*)\*|\[([^\]]+)\]\((https?:\/\/[^\s)]+)\)/g;

export function render(text) {
  const fragment = document.createDocumentFragment();
  const lines = text.split("\n");
  for (let i = 0; i < lines.length;) {
    const [node, next] = block(lines, i);
    if (node) fragment.append(node);
    i = next;
  }
  return fragment;
}

/** JSON in lines; a beginning of it as it stands. */
export function json(text) {
  try {
    return pre(JSON.stringify(JSON.parse(text), null, 2));
  } catch {
    return pre(text);
  }
}

function block(lines, i) {
  const line = lines[i];
  if (!line.trim()) return [null, i + 1];
  if (line.trimStart().startsWith("```")) return fence(lines, i);
  const heading = /^#{1,6}\s+(.*)$/.exec(line);
  if (heading) return [element("h4", heading[1]), i + 1];
  if (/^\s*([-*_])(\s*\1){2,}\s*$/.test(line)) return [document.createElement("hr"), i + 1];
  if (item(line)) return list(lines, i);
  if (line.startsWith(">")) {
    const end = run(lines, i, (l) => l.startsWith(">"));
    const quote = document.createElement("blockquote");
    quote.append(render(lines.slice(i, end).map((l) => l.replace(/^>\s?/, "")).join("\n")));
    return [quote, end];
  }
  const end = run(lines, i, (l) => l.trim() && !/^(#{1,6}\s|>|\s*```)/.test(l) && !item(l));
  return [element("p", lines.slice(i, end).join("\n")), end];
}

function fence(lines, i) {
  let end = i + 1;
  while (end < lines.length && lines[end].trim() !== "```") end++;
  return [pre(lines.slice(i + 1, end).join("\n")), end + 1];
}

function pre(text) {
  const node = document.createElement("pre");
  node.tabIndex = 0; // what scrolls can be reached by keys
  const code = document.createElement("code");
  code.textContent = text;
  node.append(code);
  return node;
}

const item = (line) => /^\s*([-*+]|\d+[.)])\s+(.*)$/.exec(line);

function list(lines, i) {
  const first = item(lines[i])[1];
  const node = document.createElement(/\d/.test(first) ? "ol" : "ul");
  if (node.tagName === "OL") node.start = parseInt(first, 10);
  const same = (line) => item(line) && /\d/.test(item(line)[1]) === /\d/.test(first);
  const end = run(lines, i, same);
  for (const line of lines.slice(i, end)) node.append(element("li", item(line)[2]));
  return [node, end];
}

function run(lines, i, belongs) {
  let end = i + 1;
  while (end < lines.length && belongs(lines[end])) end++;
  return end;
}

function element(name, text) {
  const node = document.createElement(name);
  let last = 0;
  for (const match of text.matchAll(INLINE)) {
    node.append(text.slice(last, match.index), inline(match));
    last = match.index + match[0].length;
  }
  node.append(text.slice(last));
  return node;
}

function inline([, code, strong, em, label, href]) {
  const node = document.createElement(code ? "code" : strong ? "strong" : em ? "em" : "a");
  node.textContent = code || strong || em || label;
  if (href) {
    node.href = href;
    node.rel = "noopener noreferrer";
    node.target = "_blank";
  }
  return node;
}
