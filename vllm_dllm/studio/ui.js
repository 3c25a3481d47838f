"use strict";
(() => {
  const source = "<!DOCTYPE html>\n" + document.documentElement.outerHTML;  // before anything is changed
  const $ = (id) => document.getElementById(id);
  const given = JSON.parse($("given").textContent) || {};
  const server = given.server || null;
  const DRAFTED = "With drafts", PLAIN = "Without drafts";
  let runs = [], about = {}, axis = "nfe", place = 0, isLive = false, timer = null, controller = null;

  const make = (tag, text, className) => {
    const element = document.createElement(tag);
    if (text !== undefined) element.textContent = text;
    if (className) element.className = className;
    return element;
  };
  const number = (value, digits = 0) => (value === null || !isFinite(value) ? "–" : value.toLocaleString("en", { maximumFractionDigits: digits, minimumFractionDigits: digits }));

  // One run's panel. It is filled by text alone: whatever a server says stays text.
  function panelOf(run) {
    const root = $("run").content.cloneNode(true).firstElementChild;
    const find = (name) => root.querySelector(name);
    const panel = { run, root, cells: [], chosen: null, shown: studio.film(run), frame: null };
    find("h2").textContent = run.name;
    const canvas = find(".canvas");
    canvas.setAttribute("aria-label", `${run.name}: positions of the reply; arrow keys tell of each`);
    const choose = (at) => {
      if (!panel.cells.length) return;
      panel.chosen = Math.min(Math.max(at, 0), panel.cells.length - 1);
      panel.cells.forEach((cell, i) => cell.classList.toggle("chosen", i === panel.chosen));
      tell(panel);
    };
    canvas.addEventListener("keydown", (event) => {
      const moves = { ArrowRight: 1, ArrowDown: 1, ArrowLeft: -1, ArrowUp: -1, Home: -Infinity, End: Infinity };
      if (!(event.key in moves)) return;
      event.preventDefault();
      choose(panel.chosen === null ? 0 : panel.chosen + moves[event.key]);
    });
    const pointed = (event) => { const at = panel.cells.indexOf(event.target); if (at >= 0) choose(at); };
    canvas.addEventListener("click", pointed);
    canvas.addEventListener("pointerover", pointed);
    find(".json").textContent = JSON.stringify(run.body, null, 2);
    find(".curl").textContent = studio.curlOf(server || "http://127.0.0.1:8000", run.body, server !== null && $("key").value !== "");
    for (const button of root.querySelectorAll("[data-copy]")) button.addEventListener("click", () => {
      navigator.clipboard.writeText(find("." + button.dataset.copy).textContent)
        .then(() => say("Copied."), () => say("The browser does not let this page copy; select the text instead."));
    });
    return panel;
  }

  function tell(panel) {
    const about = panel.root.querySelector(".about"), at = panel.chosen;
    if (at === null || at >= panel.cells.length) { about.textContent = "Point at a position, or walk there by the arrow keys, to read its confidence."; return; }
    const cell = panel.frame.cells[at];
    if (!cell) { about.textContent = `position ${at + 1}: masked`; return; }
    const p = studio.confidence(panel.shown, at, cell), token = panel.shown.emitted[at];
    const others = token && token.text === cell.text ? token.top.filter(([text]) => text !== cell.text) : [];
    about.textContent = `position ${at + 1}: ${JSON.stringify(cell.text)}, unmasked by forward ${cell.nfe}` +
      (p === null ? "" : `, confidence ${studio.percent(p)}`) +
      (others.length ? `; next ${others.map(([text, logprob]) => `${JSON.stringify(text)} ${studio.percent(Math.exp(logprob))}`).join(", ")}` : "");
  }

  function drawCanvas(panel) {
    const { shown, frame } = panel, canvas = panel.root.querySelector(".canvas");
    if (panel.cells.length !== frame.cells.length) {  // positions came or went: lay them out again, by block
      const starts = shown.starts.filter((start) => start > 0 && start < frame.cells.length);
      panel.cells = frame.cells.map(() => make("span", "", "cell"));
      canvas.replaceChildren(...[0, ...starts].map((start, i) => {
        const block = make("div", undefined, "block");
        block.append(...panel.cells.slice(start, i < starts.length ? starts[i] : undefined));
        return block;
      }));
    }
    // A masked position is as wide as its token will be, where that is known, so that nothing moves.
    const last = shown.frames[shown.frames.length - 1].cells;
    const room = frame.cells.map((_, i) => (last[i] ? studio.shownText(last[i].text).text : ""));
    frame.cells.forEach((cell, i) => {
      const element = panel.cells[i], look = cell && studio.shownText(cell.text), p = cell && studio.confidence(shown, i, cell);
      const text = cell ? look.text : room[i];
      let kind = "cell" + (cell === null ? " masked" : look.isEnd ? " end" : "") + (p === null ? "" : ` c${studio.bin(p)}`);
      if (cell && cell.nfe === frame.nfe) kind += " new";
      if (i === panel.chosen) kind += " chosen";
      if (element.textContent !== text) element.textContent = text;
      if (element.className !== kind) element.className = kind;
    });
    tell(panel);
  }

  function drawNumbers(panel) {
    const n = studio.numbersAt(panel.shown, panel.frame);
    const rows = [["forwards", number(n.nfe)], ["tokens/s", number(n.speed, 1)], ["tokens", number(n.tokens)],
      ["drafts", number(n.proposed)], ["accepted", number(n.accepted)], ["wasted", number(n.wasted)]];
    panel.root.querySelector("dl").replaceChildren(...rows.map(([name, value]) => {
      const row = make("div");
      row.append(make("dt", name), make("dd", value));
      return row;
    }));
    panel.root.querySelector(".head span").textContent = `${number(n.seconds, 2)} s`;
  }

  function shape(kind, attributes) {
    const element = document.createElementNS("http://www.w3.org/2000/svg", kind);
    for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
    return element;
  }

  // Upwards what a step unmasked, the part that accepted drafts stand for below it; downwards what was wasted. A bar is drawn once, in
  // forwards and positions, and its group is scaled as steps come. Of several forwards, where a client was slow, it is as wide as these.
  function drawSteps(panel, length) {
    const svg = panel.root.querySelector("svg"), steps = panel.shown.steps, width = 100 / Math.max(length, 1);
    if (!panel.bars) {
      panel.bars = { drawn: 0, up: 1, down: 1, above: shape("g", {}), below: shape("g", {}), now: shape("line", { class: "now", y1: 0, y2: 66, "vector-effect": "non-scaling-stroke" }) };
      svg.replaceChildren(panel.bars.above, panel.bars.below, shape("line", { class: "axis", x1: 0, y1: 45, x2: 100, y2: 45, "vector-effect": "non-scaling-stroke" }), panel.bars.now);
    }
    const bars = panel.bars;
    for (; bars.drawn < steps.length; bars.drawn += 1) {
      const { nfe, forwards, unmasked, accepted, wasted } = steps[bars.drawn];
      const bar = (group, kind, y, height) => { if (height > 0) group.append(shape("rect", { class: kind, x: nfe - forwards + 0.1, y, width: forwards - 0.2, height })); };
      const all = unmasked / forwards, drafted = Math.min(accepted, unmasked) / forwards;
      bar(bars.above, "model", drafted, all - drafted);
      bar(bars.above, "draft", 0, drafted);
      bar(bars.below, "waste", 0, wasted / forwards);
      bars.up = Math.max(bars.up, all);
      bars.down = Math.max(bars.down, wasted / forwards);
    }
    bars.above.setAttribute("transform", `translate(0 44) scale(${width} ${-42 / bars.up})`);
    bars.below.setAttribute("transform", `translate(0 46) scale(${width} ${20 / bars.down})`);
    for (const end of ["x1", "x2"]) bars.now.setAttribute(end, panel.frame.nfe * width);
    const last = studio.numbersAt(panel.shown, panel.shown.frames[panel.shown.frames.length - 1]);
    svg.setAttribute("aria-label", `By forward: ${last.tokens} tokens in ${last.nfe} forwards; of ${last.proposed} drafts ${last.accepted} accepted and ${last.wasted} wasted`);
  }

  function draw() {
    const end = Math.max(1, ...runs.map((panel) => panel.shown.frames[panel.shown.frames.length - 1][axis]));
    const longest = Math.max(1, ...runs.map((panel) => panel.shown.frames[panel.shown.frames.length - 1].nfe));
    if (isLive) place = end;
    for (const panel of runs) {
      panel.frame = studio.frameAt(panel.shown, axis, place);
      drawCanvas(panel);
      drawNumbers(panel);
      drawSteps(panel, longest);
    }
    $("runs").classList.toggle("one", runs.length < 2);
    $("place").max = String(Math.ceil(end));
    $("place").value = String(place);
    const text = axis === "nfe" ? `forward ${Math.round(place)} of ${end}` : `${(place / 1000).toFixed(2)} of ${(end / 1000).toFixed(2)} s`;
    $("at").textContent = text;
    $("place").setAttribute("aria-valuetext", text);
    drawVerdict();
  }

  function drawVerdict() {
    const verdict = $("verdict"), [first, second] = runs;
    const result = second ? studio.compared(first.shown, second.shown) : null;
    if (!result) { verdict.textContent = first && first.shown.numbers && first.shown.numbers.exactness === null ? "This server has no speculation: every position is the model's own." : ""; return; }
    const same = make("span", result.isSame ? "the same text" : "other text: see “When texts differ” in docs/studio.md", result.isSame ? "same" : "differs");
    verdict.replaceChildren(make("strong", `${number(result.forwards[0])} forwards`), ` instead of ${number(result.forwards[1])}, `,
      make("strong", `${number(result.speed, 2)}×`), " the tokens/s, ", same, ".");
  }

  function drawLegend() {
    const labels = studio.LABELS.map((label, i) => [`c${i}`, i === 0 ? `confidence ${label}` : label]);
    const entries = { positions: [["", "masked"], ...labels, ["new", "unmasked by this forward"]],
      steps: [["model", "a forward’s positions: its own"], ["draft", "by accepted drafts"], ["waste", "below the line: wasted drafts"]] };
    for (const [id, each] of Object.entries(entries)) $(id).replaceChildren(...each.map(([kind, label]) => {
      const item = make("li"), swatch = make("span", undefined, `swatch ${kind}`);
      item.append(swatch, label);
      return item;
    }));
  }

  const say = (text) => { $("status").textContent = text; };

  function show(all) {
    runs = all.map(panelOf);
    $("runs").replaceChildren(...runs.map((panel) => panel.root));
    $("stage").hidden = runs.length === 0;
    draw();
  }

  function move(to, live = false) {
    const end = Number($("place").max);
    isLive = live;
    place = Math.min(Math.max(to, 0), end);
    draw();
  }

  // Forwards are shown at a steady pace, time as it passed.
  function play() {
    if (timer !== null) return pause();
    const end = Number($("place").max);
    if (place >= end) move(0);
    $("play").textContent = "Pause";
    let before = performance.now();
    const pace = Math.max(40, Math.min(250, 8000 / end));
    timer = setInterval(() => {
      const now = performance.now();
      move(axis === "nfe" ? place + 1 : place + now - before);
      before = now;
      if (place >= Number($("place").max)) pause();
    }, axis === "nfe" ? pace : 40);
  }

  function pause() {
    clearInterval(timer);
    timer = null;
    $("play").textContent = "Play";
  }

  function step(by) {
    pause();
    const places = [...new Set(runs.flatMap((panel) => panel.shown.frames.map((frame) => frame[axis])))].sort((a, b) => a - b);
    const next = by > 0 ? places.find((each) => each > place) : places.filter((each) => each < place).pop();
    if (next !== undefined) move(next);
  }

  function fail(text) {
    $("error").textContent = text;
    $("error").hidden = text === "";
  }

  async function ask(path, options) {
    const headers = { ...(options.headers || {}) };
    if ($("key").value) headers.Authorization = `Bearer ${$("key").value}`;
    let reply;
    try {
      reply = await fetch(path, { ...options, headers });
    } catch (error) {
      if (error.name === "AbortError") throw error;
      throw new Error("`vllm-dllm studio`, which served this page, does not answer: start it again.");
    }
    if (reply.status === 401) throw new Error("The server asks for its API key: see “Options of the request”.");
    if (!reply.ok) {
      const text = await reply.text();
      let message = text;
      try { message = JSON.parse(text).error.message; } catch { /* it is no JSON of the API: shown as it is */ }
      throw new Error(`${reply.status}: ${message}`);
    }
    return reply;
  }

  async function stream(run, redraw) {
    const begin = performance.now();
    const reply = await ask(studio.pathOf(run.body), { method: "POST", body: JSON.stringify(run.body), signal: controller.signal, headers: { "Content-Type": "application/json" } });
    const parse = studio.eventParser(), reader = reply.body.pipeThrough(new TextDecoderStream()).getReader();
    for (;;) {
      const { value, done } = await reader.read();
      if (done) return;
      const ms = Math.round(10 * (performance.now() - begin)) / 10;
      for (const chunk of parse(value)) {
        if (chunk.error) throw new Error(chunk.error.message || "The server ended the stream with an error.");
        run.events.push([ms, studio.kept(chunk)]);
      }
      redraw();
    }
  }

  function options() {
    let more = {};
    if ($("more").value.trim()) {
      try { more = JSON.parse($("more").value); } catch (error) { throw new Error(`“More fields” is not JSON (${error.message}).`); }
      if (more === null || typeof more !== "object" || Array.isArray(more)) throw new Error("“More fields” must be a JSON object, as {\"seed\": 1}.");
    }
    if (!$("model").value) throw new Error("The server has not said which models it has; is it running? Reload this page when it does.");
    return { model: $("model").value, api: $("api").value, prompt: $("prompt").value, maxTokens: Number($("max").value),
      temperature: $("temperature").value === "" ? null : Number($("temperature").value), policy: $("policy").value.trim(), more };
  }

  async function run() {
    pause();
    fail("");
    let chosen;
    try { chosen = options(); } catch (error) { return fail(error.message); }
    controller = new AbortController();
    $("go").disabled = true;
    $("stop").disabled = false;
    about = { model: chosen.model, prompt: chosen.prompt, created: new Date().toISOString() };
    const all = [];
    try {
      for (const drafts of $("both").checked ? [true, false] : [true]) {
        const next = { name: drafts ? DRAFTED : PLAIN, body: studio.requestBody(chosen, drafts), events: [] };
        all.push(next);
        show(all);
        say(`${next.name}: running`);
        isLive = true;
        let isDue = false;
        await stream(next, () => {
          if (isDue) return;
          isDue = true;
          requestAnimationFrame(() => { isDue = false; const panel = runs[all.indexOf(next)]; if (panel) { panel.shown.update(); draw(); } });
        });
        runs[all.indexOf(next)].shown.update();
        draw();
        const { numbers, isOpen } = runs[all.indexOf(next)].shown;
        if (isOpen) throw new Error("The stream broke off; the server's log says why.");
        if (numbers === null) throw new Error(`The server does not say how it denoised: ${chosen.model} is no model that vllm-dllm serves.`);
        if (drafts && numbers.exactness === null) break;  // the second one would be the same
      }
      say($("verdict").textContent || "Done.");
    } catch (error) {
      if (error.name === "AbortError") say("Stopped.");
      else fail(error.message);
      if (all.length && !all[all.length - 1].events.length) { all.pop(); show(all); }
    } finally {
      controller.abort();  // what was not read to its end
      isLive = false;
      $("go").disabled = false;
      $("stop").disabled = true;
    }
  }

  function save() {
    const recording = studio.recordingOf(runs.map((panel) => panel.run), about);
    const link = make("a");
    link.href = URL.createObjectURL(new Blob([studio.embedded(source, recording)], { type: "text/html" }));
    link.download = "denoising.html";
    link.click();
    setTimeout(() => URL.revokeObjectURL(link.href), 1000);
    say("The recording is saved as denoising.html.");
  }

  $("play").addEventListener("click", play);
  $("back").addEventListener("click", () => step(-1));
  $("forth").addEventListener("click", () => step(1));
  $("place").addEventListener("input", () => { pause(); move(Number($("place").value)); });
  $("save").addEventListener("click", save);
  for (const radio of document.getElementsByName("axis")) radio.addEventListener("change", () => {
    pause();
    const wasAtEnd = place >= Number($("place").max);
    axis = radio.value;
    draw();
    move(wasAtEnd ? Number($("place").max) : 0);
  });
  $("form").addEventListener("submit", (event) => { event.preventDefault(); run(); });
  $("stop").addEventListener("click", () => controller.abort());
  $("prompt").addEventListener("keydown", (event) => { if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) { event.preventDefault(); $("form").requestSubmit(); } });

  async function loadModels() {
    try {
      const models = (await (await ask("/v1/models", {})).json()).data.map((model) => model.id);
      $("model").replaceChildren(...models.map((id) => make("option", id)));
      $("where").textContent = `${models.join(", ")} at ${server}`;
      fail("");
    } catch (error) {
      fail(error.message);
    }
  }

  drawLegend();
  if (given.recording) {
    try {
      const recording = studio.checked(given.recording);
      about = { model: recording.model, prompt: recording.prompt, created: recording.created };
      $("where").textContent = `${recording.model}: ${recording.prompt}`;
      show(recording.runs);
      move(Number($("place").max));
    } catch (error) {
      $("where").textContent = `This file's recording cannot be shown: ${error.message}.`;
    }
  } else {
    $("form").hidden = false;
    $("policies").replaceChildren(...given.policies.map((name) => make("option", name)));
    $("where").textContent = server;
    $("key").addEventListener("change", loadModels);
    loadModels();
  }
})();
