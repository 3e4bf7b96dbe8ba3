// One layer's neighbourhood: four lanes from top to bottom; in a lane, time goes from left to right.
const BOX = { width: 152, height: 36, gapX: 26, gapY: 10, left: 112, lane: 18 };

// Column of each box in its lane: behind all that it reads there.
function columns(boxes, arrows) {
  const own = arrows.filter(([start, end]) => boxes[start][2] === boxes[end][2]);
  const column = boxes.map(() => 0);
  for (let changed = true; changed;) {
    changed = false;
    for (const [start, end] of own) {
      if (column[end] <= column[start]) { column[end] = column[start] + 1; changed = true; }
    }
  }
  // What nothing in the lane leads to stands right before its first reader.
  boxes.forEach((_, index) => {
    const readers = own.filter(([start]) => start === index).map(([, end]) => column[end]);
    if (readers.length && !own.some(([, end]) => end === index)) column[index] = Math.min(...readers) - 1;
  });
  return column;
}

function places(boxes, arrows, lanes) {
  const column = columns(boxes, arrows);
  const place = [];
  const tops = [];
  let y = 6;
  lanes.forEach((_, lane) => {
    const stacked = new Map();
    tops.push(y);
    let deepest = 1;
    boxes.forEach((box, index) => {
      if (box[2] !== lane) return;
      const depth = stacked.get(column[index]) ?? 0;
      stacked.set(column[index], depth + 1);
      deepest = Math.max(deepest, depth + 1);
      const above = place.find((other, at) => other?.last && boxes[at][2] === lane && column[at] === column[index]);
      if (above) Object.assign(above, { covered: true, last: false });
      place[index] = { depth, last: true, x: BOX.left + column[index] * (BOX.width + BOX.gapX), y: y + 8 + depth * (BOX.height + BOX.gapY) };
    });
    y += BOX.lane + deepest * (BOX.height + BOX.gapY);
  });
  tops.push(y);
  const width = BOX.left + (Math.max(...column) + 1) * (BOX.width + BOX.gapX);
  return { place, tops, width, height: y + 6 };
}

// In a lane from side to side; from lane to lane downwards, beside boxes that stand above or below.
function curve(from, to, sameLane) {
  if (sameLane) {
    const x1 = from.x + BOX.width, y1 = from.y + BOX.height / 2, x2 = to.x - 5, y2 = to.y + BOX.height / 2;
    const bend = Math.max(10, Math.min(50, Math.abs(x2 - x1) / 2));
    return { line: `M${x1} ${y1}C${x1 + bend} ${y1} ${x2 - bend} ${y2} ${x2} ${y2}`, tip: `M${x2 + 5} ${y2}l-6 -3v6z` };
  }
  const x1 = from.covered ? from.x + BOX.width : from.x + BOX.width / 2;
  const y1 = from.y + (from.covered ? BOX.height / 2 : BOX.height);
  const x2 = to.depth ? to.x - 5 : to.x + BOX.width / 2;
  const y2 = to.depth ? to.y + BOX.height / 2 : to.y - 5;
  const fall = Math.max(16, Math.abs(y2 - y1) / 2);
  const out = from.covered ? `${x1 + BOX.gapX} ${y1}` : `${x1} ${y1 + fall}`;
  const into = to.depth ? `${x2 - BOX.gapX} ${y2}` : `${x2} ${y2 - fall}`;
  return { line: `M${x1} ${y1}C${out} ${into} ${x2} ${y2}`, tip: to.depth ? `M${x2 + 5} ${y2}l-6 -3v6z` : `M${x2} ${y2 + 5}l-3 -6h6z` };
}

const cut = (text, room) => (text.length <= room ? text : `${text.slice(0, room - 1)}…`);

function drawGraph(data, graph) {
  const [boxes, arrows, through] = graph;
  if (!boxes.length) return make("p", { class: "hint" }, "Nothing to draw.");
  const { place, tops, width, height } = places(boxes, [...arrows, ...through], data.lanes);
  const svg = make("svg", { class: "graph", width, height, viewBox: `0 0 ${width} ${height}`, role: "group",
    "aria-label": "Operations around the layer, by role" });
  data.lanes.forEach((name, lane) => svg.append(
    make("rect", { class: `lane ${name}`, x: 0, y: tops[lane], width, height: tops[lane + 1] - tops[lane] - 3, rx: 4 }),
    make("text", { class: `lane ${name}`, x: 10, y: tops[lane] + 22 }, name)));
  const edges = [];
  const edge = ([start, end], hidden) => {
    const { line, tip } = curve(place[start], place[end], boxes[start][2] === boxes[end][2]);
    const path = make("path", { class: hidden ? "edge hidden" : "edge", d: line });
    edges.push([start, end, path]);
    svg.append(path, make("path", { class: "tip", d: tip }));
  };
  arrows.forEach((arrow) => edge(arrow, false));
  through.forEach((arrow) => edge(arrow, true));
  const last = data.programs[data.programs.length - 1].name;
  boxes.forEach((box, index) => {
    const [title, note, lane, kind] = box;
    const { x, y } = place[index];
    const kindName = ["key", "ops", "near"][kind];
    const lines = box.length > 4 ? `, line ${box[4] + 1}` : "";
    const light = (on) => {
      for (const [start, end, path] of edges) path.classList.toggle("lit", on && (start === index || end === index));
    };
    const group = svgLink(box.length > 4 ? `#program/${last}/${spanText(box)}` : null, {
      class: `box ${data.lanes[lane]} ${kindName}`, "aria-label": `${data.lanes[lane]}: ${title}, ${note}${lines}`,
      onmouseenter: () => light(true), onmouseleave: () => light(false), onfocus: () => light(true), onblur: () => light(false),
    });
    group.append(make("rect", { x, y, width: BOX.width, height: BOX.height, rx: kind === 1 ? 16 : 3 }),
      make("text", { class: "name", x: x + 10, y: y + 15 }, cut(title, 20)),
      make("text", { class: "note", x: x + 10, y: y + 29 }, cut(note, 21)));
    const tip = document.createElementNS(SVG, "title");
    tip.textContent = `${title}\n${note}${lines}`;
    group.append(tip);
    svg.append(group);
  });
  return make("div", { class: "scroll drawn", tabindex: "0", role: "region", "aria-label": "Drawing of the neighbourhood" }, svg);
}

function svgLink(href, attributes) {
  const link = document.createElementNS(SVG, "a");
  if (href) link.setAttribute("href", href);
  for (const [name, value] of Object.entries(attributes)) {
    if (name.startsWith("on")) link.addEventListener(name.slice(2), value);
    else link.setAttribute(name, value);
  }
  return link;
}

// `12-14,20-20`: the lines of a box, counted from one.
const spanText = (box) => {
  const parts = [];
  for (let i = 4; i < box.length; i += 2) parts.push(`${box[i] + 1}-${box[i + 1] + 1}`);
  return parts.join(",");
};
