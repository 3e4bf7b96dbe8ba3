// Texts at the right of the strip: as much of each as the width has room for, the rest on hovering.
function fitStrip() {
  const box = byId("strip");
  const texts = [...box.querySelectorAll("text[data-full]")];
  const ENDING = 10;
  const fit = () => {
    const { right, width } = box.querySelector("svg").getBoundingClientRect();
    if (!width) return;
    for (const text of texts) text.textContent = text.dataset.full;
    const sizes = texts.map((text) => [text.getBoundingClientRect().left, text.getComputedTextLength()]);
    texts.forEach((text, index) => {
      const [left, needed] = sizes[index];
      const share = (right - ENDING - left) / needed;
      const { full } = text.dataset;
      if (share < 1) text.textContent = `${full.slice(0, Math.max(0, Math.floor(full.length * share) - 2)).trimEnd()}\u2026`;
    });
  };
  new ResizeObserver(fit).observe(box);
  fit();
}
