// Puts the parts together. The address says what is shown, so that going back works.
readData().then((data) => {
  const linesOf = programLines(data.programs);
  const table = layerTable(data, layerDetail(data, linesOf));
  const filterSkips = skipTable(data.skips);
  fitStrip();
  const showCode = codeView(data, linesOf);
  const input = byId("filter");
  let place = 0;

  const filter = (text) => { input.value = text; table.filter(text); filterSkips(text); };
  filterSkips("");
  input.addEventListener("input", () => {
    if (!byId("view-code").hidden) { location.hash = "#layers"; input.focus(); }
    filter(input.value);
  });
  document.addEventListener("keydown", (event) => {
    const typing = event.target.matches("input[type=search], input[type=text], select");
    if (event.key === "/" && !typing && !event.ctrlKey && !event.metaKey && !event.altKey) {
      event.preventDefault();
      input.focus();
      input.select();
    } else if (event.key === "Escape" && input.value) {
      filter("");
      input.focus();
    }
  });

  const show = () => {
    const [view, ...rest] = location.hash.slice(1).split("/").map(decodeURIComponent);
    const isCode = view === "program" || view === "changes";
    const was = byId("view-code").hidden;
    if (was && isCode) place = window.scrollY;
    byId("view-code").hidden = !isCode;
    byId("view-layers").hidden = isCode;
    document.querySelectorAll("nav a").forEach((link) => {
      const current = link.dataset.view === (isCode || view === "skipped" ? view : "layers");
      if (current) link.setAttribute("aria-current", "page");
      else link.removeAttribute("aria-current");
    });
    if (isCode) {
      window.scrollTo(0, 0);
      showCode(view, rest[0], rest[1]);
      byId("codetitle").focus({ preventScroll: true });
    } else if (view === "layer") {
      table.open(rest[0]);
    } else if (view === "layers" || view === "skipped") {
      byId(view).scrollIntoView();
    } else if (!was) {
      window.scrollTo(0, place);
    }
  };
  window.addEventListener("hashchange", show);
  // The same address again is no change of it, but still a wish to see the layer.
  byId("strip").addEventListener("click", (event) => {
    const link = event.target.closest("a");
    if (link && link.getAttribute("href") === location.hash) show();
  });
  show();
  document.documentElement.dataset.ready = "true";
});
