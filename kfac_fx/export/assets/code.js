// Whole programs and what each pass changed. Lines stand in blocks that the browser lays out when they are seen.
const BLOCK = 200;
const CONTEXT = 3;

function lineClass(text) {
  const line = text.trimStart();
  if (line.startsWith("# ----")) return "l inserted";
  if (line.startsWith("# kfac_fx")) return "l label";
  return line.startsWith("#") ? "l comment" : "l";
}

function inBlocks(target, elements) {
  const blocks = [];
  for (let i = 0; i < elements.length; i += BLOCK) {
    const part = elements.slice(i, i + BLOCK);
    const block = make("div", { class: "block", style: `contain-intrinsic-size:auto ${part.length * 1.45}em` });
    block.append(...part);
    blocks.push(block);
  }
  target.replaceChildren(...blocks);
}

// The rule with pass and layer, or the user's line, that stands at or above a line of a program.
function sectionOf(lines, at, last) {
  for (let n = Math.max(at, 0); n < last; n++) if (/^ *# -{4} /.test(lines[n])) return lines[n].replace(/^ *# -+ | -+$/g, "");
  for (let n = at; n >= 0; n--) {
    if (/^ *# -{4} /.test(lines[n])) return lines[n].replace(/^ *# -+ | -+$/g, "");
    if (/^ *# \S+:\d+ /.test(lines[n])) return lines[n].trim().slice(2);
  }
  return "";
}

function diffElements(old, lines, hunks) {
  const elements = [];
  const add = (css, mark, a, b, text) => elements.push(make("div", { class: `${lineClass(text)} ${css}` },
    make("span", { class: "n" }, a), make("span", { class: "n" }, b), make("span", { class: "sign" }, mark), text || "\n"));
  let done = 0;
  for (let i = 0; i < hunks.length; i += 4) {
    const [start, end, from, to] = hunks.slice(i, i + 4);
    const shown = Math.max(done, start - CONTEXT);
    if (shown > done || i === 0) {
      elements.push(make("div", { class: "l place" }, `line ${from - (start - shown) + 1}  ${sectionOf(lines, from, to)}`));
    }
    for (let n = shown; n < start; n++) add("", " ", n + 1, from - (start - n) + 1, old[n]);
    for (let n = start; n < end; n++) add("gone", "−", n + 1, "", old[n]);
    for (let n = from; n < to; n++) add("new", "+", "", n + 1, lines[n]);
    const next = i + 4 < hunks.length ? hunks[i + 4] : old.length;
    done = Math.min(end + CONTEXT, next);
    for (let n = end; n < done; n++) add("", " ", n + 1, to + (n - end) + 1, old[n]);
  }
  return elements;
}

function codeView(data, linesOf) {
  const target = byId("code");
  const names = data.programs.map((program) => program.name);
  let shown = "";
  const counts = data.programs.map(({ hunks }) => {
    let gone = 0, added = 0;
    for (let i = 0; i < hunks.length; i += 4) { gone += hunks[i + 1] - hunks[i]; added += hunks[i + 3] - hunks[i + 2]; }
    return { gone, added };
  });
  const choices = (view, index) => {
    byId("stages").replaceChildren(...data.programs.map((program, at) => make("a", {
      href: `#${view}/${program.name}`, "aria-current": at === index ? "true" : null },
    `${at} ${program.name}`, make("span", {}, at ? ` +${exact(counts[at].added)} −${exact(counts[at].gone)}` : ""))));
    byId("modes").replaceChildren(...[["program", "whole program"], ["changes", "changes of this pass"]].map(([name, text]) =>
      make("a", { href: `#${name}/${names[index]}`, "aria-current": name === view ? "true" : null }, text)));
  };
  const draw = (view, index) => {
    const lines = linesOf(index);
    if (view === "changes" && index > 0) {
      inBlocks(target, diffElements(linesOf(index - 1), lines, data.programs[index].hunks));
      if (!target.children.length) target.append(make("p", { class: "hint" }, "This pass changed nothing."));
    } else {
      inBlocks(target, lines.map((text, n) => make("div", { class: lineClass(text), id: `L${n + 1}` },
        make("span", { class: "n" }, String(n + 1)), text || "\n")));
    }
    target.classList.toggle("diff", view === "changes" && index > 0);
    target.scrollTop = 0;
  };
  const mark = (spans) => {
    target.querySelectorAll(".marked").forEach((line) => line.classList.remove("marked"));
    for (const [start, end] of spans) for (let n = start; n <= end; n++) byId(`L${n}`)?.classList.add("marked");
    const line = spans.length ? byId(`L${spans[0][0]}`) : null;
    line?.scrollIntoView({ block: "center" });
  };
  byId("goto").addEventListener("change", (event) => {
    const wanted = Number.parseInt(event.target.value, 10);
    const stage = shown.split("/")[1];
    if (wanted > 0) location.hash = `#program/${stage}/${wanted}`;
  });
  return (view, name, where) => {
    const index = names.includes(name) ? names.indexOf(name) : names.length - 1;
    choices(view, index);
    const about = data.programs[index].about;
    byId("codetitle").textContent = view === "changes" ? "What the pass changed" : "Program after the pass";
    byId("about").textContent = index === 0 && view === "changes" ? `${about} There is nothing before it to compare with.` : about;
    const wanted = `${view}/${names[index]}`;
    if (shown !== wanted) draw(view, index);
    shown = wanted;
    const spans = (where ?? "").split(",").filter(Boolean).map((part) => {
      const [start, end] = part.split("-").map(Number);
      return [start, end || start];
    });
    mark(spans.filter(([start]) => start > 0));
  };
}
