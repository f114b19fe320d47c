"use strict";
// What the pages of alignprop can do: sort cards, draw plots, move through a run's images, copy
// commands. Texts from outside are set as text, never as HTML.
(() => {
  const data = JSON.parse(document.getElementById("data").textContent);
  const find = (query) => document.querySelector(query);
  const make = (tag, text = "", attributes = {}) => {
    const made = Object.assign(document.createElement(tag), attributes);
    if (text) made.textContent = text;
    return made;
  };
  // What was chosen survives a reload, also of a page that is opened as a file.
  const key = `alignprop ${location.pathname}`;
  let kept = {};
  try { kept = JSON.parse(sessionStorage.getItem(key)) || {}; } catch { /* not allowed here */ }
  const keep = (changes) => {
    Object.assign(kept, changes);
    try { sessionStorage.setItem(key, JSON.stringify(kept)); } catch { /* not allowed here */ }
  };

  // 1. Sorting.
  const select = find("#sort");
  if (select) select.addEventListener("change", () => {
    const cards = find("#sorted");
    const [by, order] = [select.value, select.selectedOptions[0].dataset.order === "up" ? 1 : -1];
    [...cards.children]
      .sort((a, b) => order * (Number(a.dataset[by]) - Number(b.dataset[by])))
      .forEach((card) => cards.append(card));
  });

  // 2. The slider: every image is in the data, and put into the same few elements.
  const slider = find("#step");
  if (slider) {
    const { prompts, steps } = data.images;
    const output = find("#shown"), beside = find("#beside"), cards = find("#samples");
    const number = (value) => value === null ? "" : value.toFixed(3).replace("-", "\u2212");
    const figures = prompts.map((prompt) => {
      const article = make("article"), row = make("div", "", { className: "images" });
      const pair = ["base model", "LoRA"].map((what) => {
        const figure = make("figure"), image = make("img", "", { decoding: "async" });
        const caption = make("figcaption");
        figure.append(image, caption);
        row.append(figure);
        return { what, figure, image, caption };
      });
      article.append(row, make("p", prompt, { className: "prompt" }));
      cards.append(article);
      return pair;
    });
    const fill = (place, frame, index, title) => {
      const { image, caption } = place, prompt = prompts[index];
      if (image.src !== frame.images[index]) image.src = frame.images[index];
      image.alt = `${title}: ${prompt}`;
      image.className = frame.is_small ? "small" : "";
      [image.width, image.height] = frame.size;
      caption.replaceChildren(make("strong", title));
      for (const [name, values] of Object.entries(frame.rewards)) {
        const base = steps[0].rewards[name], value = values[index];
        const change = place.what === "LoRA" && base ? value - base[index] : 0;
        const text = `${name} ${number(value)}`;
        const told = change ? ` (${change > 0 ? "+" : "\u2212"}${number(Math.abs(change))})` : "";
        caption.append(make("br"), text + told);
      }
    };
    const show = () => {
      const frame = steps[Number(slider.value)];
      const title = frame.step === 0 ? "base model" : `step ${frame.step}`;
      const text = frame.step === 0 ? title : `step ${frame.step} of ${data.images.last}`;
      output.textContent = frame.is_best ? `${text}, the best` : text;
      slider.setAttribute("aria-valuetext", output.textContent);
      figures.forEach(([base, tuned], index) => {
        base.figure.hidden = !beside.checked;
        if (beside.checked) fill(base, steps[0], index, "base model");
        fill(tuned, frame, index, title);
      });
    };
    slider.max = String(steps.length - 1);
    // Unless a step was chosen, a page that is loaded again shows the newest.
    const chosen = steps.findIndex((frame) => frame.step === kept.step);
    slider.value = String(chosen < 0 ? steps.length - 1 : chosen);
    if (kept.beside !== undefined) beside.checked = kept.beside;
    slider.addEventListener("input", () => {
      const at = Number(slider.value);
      keep({ step: at === steps.length - 1 ? undefined : steps[at].step });
      show();
    });
    beside.addEventListener("change", () => { keep({ beside: beside.checked }); show(); });
    // The arrow keys move it from anywhere but other controls.
    document.addEventListener("keydown", (event) => {
      const move = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
      const busy = event.altKey || event.ctrlKey || event.metaKey || event.shiftKey;
      if (!move || busy || document.activeElement !== document.body) return;
      slider.value = String(Number(slider.value) + move);
      slider.dispatchEvent(new Event("input"));
      event.preventDefault();
    });
    find("#slider").hidden = false;
    show();
  }

  // 3. Commands, and how old the page is.
  for (const button of document.querySelectorAll("button.copy")) {
    button.hidden = !navigator.clipboard;
    button.addEventListener("click", async () => {
      const place = button.parentElement.querySelector("pre");
      try {
        await navigator.clipboard.writeText(place.textContent);
        button.textContent = "copied";
      } catch {
        // The browser may refuse it; selected, the text can be copied by hand.
        getSelection().selectAllChildren(place);
        button.textContent = "selected";
      }
      setTimeout(() => { button.textContent = "copy"; }, 1500);
    });
  }
  for (const time of document.querySelectorAll("time")) {
    time.textContent = new Date(time.dateTime).toLocaleString();
  }
  const again = find("#again");
  if (again) {
    again.checked = Boolean(kept.again);
    again.addEventListener("change", () => keep({ again: again.checked }));
    setInterval(() => { if (again.checked && !document.hidden) location.reload(); }, 30000);
    again.closest(".controls").hidden = false;
  }

  // 4. Plots, after the page has been painted for the first time: Plotly takes a moment to start.
  const places = [...document.querySelectorAll(".plot")];
  const escaped = (text) =>
    text.replaceAll("&", "&amp;").replaceAll("<", "&lt;").replaceAll(">", "&gt;");
  const dark = matchMedia("(prefers-color-scheme: dark)");
  const PALETTE = ["#2158d6", "#c2410c", "#137a3f", "#7c3aed", "#b02a76", "#0e7490"];
  const PALETTE_DARK = ["#8ab0ff", "#fdba74", "#69d394", "#c4b5fd", "#f9a8d4", "#67e8f9"];
  const colour = (line) => {
    const palette = dark.matches ? PALETTE_DARK : PALETTE;
    const grey = dark.matches ? "#8d8d97" : "#85858e";
    return line.colour === 0 ? grey : palette[(line.colour - 1) % palette.length];
  };
  const traces = (line, _, all) => {
    const tint = colour(line), name = escaped(line.name);
    if (line.kind === "bars" && all.length > 2) {
      // Bars of more than two models would hide each other: their outlines do not.
      const width = line.x[1] - line.x[0];
      const x = [line.x[0] - width, ...line.x, line.x.at(-1) + width];
      const outline = { type: "scatter", mode: "lines", x, y: [0, ...line.y, 0], name };
      return [{ ...outline, line: { color: tint, shape: "hvh", width: 1.75 } }];
    }
    if (line.kind === "bars") {
      const bar = { type: "bar", x: line.x, y: line.y, name, opacity: 0.62 };
      return [{ ...bar, marker: { color: tint } }];
    }
    const mode = line.kind === "points" ? "lines+markers" : "lines";
    const faint = line.kind === "faint";
    const found = [{
      type: "scatter", mode, x: line.x, y: line.y, name,
      opacity: faint ? 0.45 : 1, hoverinfo: faint ? "skip" : "all",
      // One point alone has no line.
      ...(line.x.length === 1 ? { mode: "markers" } : {}),
      line: { color: tint, width: faint ? 1 : 1.75 }, marker: { color: tint, size: 5 },
    }];
    if (line.low) {
      const band = { x: line.x, mode: "lines", line: { width: 0 }, hoverinfo: "skip", showlegend: false };
      found.unshift(
        { ...band, y: line.low },
        { ...band, y: line.high, fill: "tonexty", fillcolor: `${tint}30` },
      );
    }
    return found;
  };
  const draw = (place, plot) => {
    const style = getComputedStyle(document.documentElement);
    const [ink, grid] = ["--ink", "--line"].map((name) => style.getPropertyValue(name).trim());
    const axis = { gridcolor: grid, linecolor: grid, zeroline: false, automargin: true };
    const lines = [];
    const rule = { type: "line", layer: "below" };
    if (plot.level !== null) lines.push({
      ...rule, xref: "paper", x0: 0, x1: 1, y0: plot.level, y1: plot.level,
      line: { color: colour({ colour: 0 }), width: 1.25, dash: "dash" },
    });
    if (plot.mark !== null) lines.push({
      ...rule, yref: "paper", y0: 0, y1: 1, x0: plot.mark, x1: plot.mark,
      line: { color: style.getPropertyValue("--good").trim(), width: 1.5, dash: "dot" },
    });
    const bars = plot.lines[0].kind === "bars";
    // Room for the dashed line, which is no data to Plotly.
    const values = plot.lines.flatMap((line) => [line.y, line.low, line.high].flat())
      .concat(plot.level).filter((value) => typeof value === "number");
    // Of steps that were all skipped there is none.
    const [low, high] = values.length ? [Math.min(...values), Math.max(...values)] : [0, 1];
    const room = 0.06 * (high - low) || 0.1 * Math.abs(high) || 1;
    // No axis goes on to 110 %.
    const [least, most] = plot.share ? [-0.02, 1.02] : [-Infinity, Infinity];
    const layout = {
      barmode: "overlay", bargap: 0.06, shapes: lines, hovermode: bars ? "closest" : "x unified",
      showlegend: plot.lines.length > 1,
      legend: { orientation: "h", x: 0, y: 1.02, yanchor: "bottom", font: { size: 11 } },
      margin: { l: 44, r: 8, t: plot.lines.length > 1 ? 26 : 8, b: 36 },
      paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)",
      font: { family: "system-ui, sans-serif", size: 11, color: ink },
      hoverlabel: { bgcolor: style.getPropertyValue("--paper").trim(), font: { color: ink } },
      xaxis: { ...axis, title: { text: escaped(plot.x_title), standoff: 6 }, nticks: 8 },
      yaxis: {
        ...axis, nticks: 6, tickformat: plot.share ? ".3~%" : "",
        ...(bars ? { rangemode: "tozero" } : { range: [Math.max(low - room, least), Math.min(high + room, most)] }),
      },
    };
    const config = { responsive: true, displaylogo: false, displayModeBar: false };
    return globalThis.Plotly.react(place, plot.lines.flatMap(traces), layout, config);
  };
  const drawAll = () => places.forEach((place, index) => {
    // One after the other, so that the page answers in between.
    setTimeout(() => draw(place, data.plots[index]), 0);
  });
  if (places.length) requestAnimationFrame(() => setTimeout(() => {
    document.body.append(make("script", find("#plotly").textContent));
    drawAll();
    dark.addEventListener("change", drawAll);
  }, 0));
})();
