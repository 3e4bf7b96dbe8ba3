// Small things that all other parts use: elements, numbers, the data.
const make = (tag, attributes = {}, ...children) => {
  const element = document.createElementNS(SVG_TAGS.has(tag) ? SVG : HTML, tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
    else if (value !== null && value !== false) element.setAttribute(name, value === true ? "" : value);
  }
  element.append(...children.filter((child) => child !== null && child !== undefined));
  return element;
};
const HTML = "http://www.w3.org/1999/xhtml";
const SVG = "http://www.w3.org/2000/svg";
const SVG_TAGS = new Set(["svg", "g", "rect", "text", "path", "line", "defs", "marker", "tspan"]);
const byId = (id) => document.getElementById(id);

const scaled = (number, base) => {
  if (number === null || number === undefined) return "";
  let value = number;
  for (const suffix of ["", "K", "M", "G", "T", "P"]) {
    const text = suffix ? value.toFixed(1) + suffix : String(Math.round(value));
    if (suffix === "P" || Number(value.toFixed(suffix ? 1 : 0)) < base) return text;
    value /= base;
  }
};
const bytes = (number) => scaled(number, 1024);
const flops = (number) => scaled(number, 1000);
const counted = (number, noun) => `${number} ${noun}${number === 1 ? "" : "s"}`;
const exact = (number) => Math.round(number).toLocaleString("en-US");

const sizeOf = (factor) => {
  const times = factor.count > 1 ? `${factor.count} × ` : "";
  if (factor.diagonal) return `${times}${factor.dim}`;
  return factor.columns === null ? `${times}${factor.dim}²` : `${times}${factor.dim} × ${factor.columns}`;
};

async function readData() {
  const data = await readJson();
  for (const [boxes] of data.graphs) {
    let last = 0;
    for (const box of boxes) for (let i = 4; i < box.length; i++) last = box[i] += last;
  }
  return data;
}

async function readJson() {
  const element = byId("data");
  const text = element.textContent;
  if (element.dataset.encoding === "json") return JSON.parse(text);
  const packed = Uint8Array.from(atob(text), (character) => character.charCodeAt(0));
  const stream = new Blob([packed]).stream().pipeThrough(new DecompressionStream("deflate"));
  return JSON.parse(await new Response(stream).text());
}

// Programs are stored as changes of the one before; `lines` puts them together when they are first wanted.
function programLines(programs) {
  const known = new Map();
  const lines = (index) => {
    if (index < 0) return [];
    if (known.has(index)) return known.get(index);
    const old = lines(index - 1);
    const { hunks, new: text } = programs[index];
    const added = text.split("\n");
    const result = [];
    let read = 0, taken = 0;
    for (let i = 0; i < hunks.length; i += 4) {
      const [start, end, first, last] = hunks.slice(i, i + 4);
      for (; read < start; read++) result.push(old[read]);
      for (let n = first; n < last; n++) result.push(added[taken++]);
      read = end;
    }
    for (; read < old.length; read++) result.push(old[read]);
    known.set(index, result);
    return result;
  };
  return lines;
}
