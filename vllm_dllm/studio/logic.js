"use strict";
// What needs no page: tests/studio runs it in a JavaScript engine without one.
const studio = (() => {
  const VERSION = 1;

  const LONGEST_EVENT = 1 << 22;

  // Returns a function that takes pieces of a stream of server-sent events, and returns the JSON bodies that they complete.
  function eventParser() {
    let rest = "";
    return (piece) => {
      const events = (rest + piece).replace(/\r\n/g, "\n").split("\n\n");
      rest = events.pop();
      if (rest.length > LONGEST_EVENT) throw new Error(`The server's answer has an event of more than ${LONGEST_EVENT} characters; is it a server of something else?`);
      return events
        .map((event) => event.split("\n").filter((line) => line.startsWith("data:")).map((line) => line.slice(5).trim()).join("\n"))
        .filter((data) => data !== "" && data !== "[DONE]")
        .map((data) => JSON.parse(data));
    };
  }

  // Of a chunk, what a recording keeps.
  function kept(chunk) {
    const { id, object, created, model, system_fingerprint, ...rest } = chunk;
    return rest;
  }

  // The body of a request; `more` are further fields, of which those of vllm_xargs are added to ours.
  function requestBody(options, drafts) {
    const { vllm_xargs: own = {}, ...more } = options.more || {};
    const xargs = { dllm_stream: "denoising" };
    if (options.policy) xargs.dllm_policy = options.policy;
    if (!drafts) xargs.dllm_speculation = false;
    const body = { model: options.model };
    if (options.api === "chat") Object.assign(body, { messages: [{ role: "user", content: options.prompt }], logprobs: true, top_logprobs: 3 });
    else Object.assign(body, { prompt: options.prompt, logprobs: 3 });
    body.max_tokens = options.maxTokens;
    if (options.temperature !== null) body.temperature = options.temperature;
    return { ...body, stream: true, stream_options: { include_usage: true }, ...more, vllm_xargs: { ...xargs, ...own } };
  }

  const pathOf = (body) => (body.messages ? "/v1/chat/completions" : "/v1/completions");
  const quoted = (text) => "'" + text.replace(/'/g, "'\\''") + "'";

  function curlOf(server, body, hasKey) {
    const key = hasKey ? ' \\\n  -H "Authorization: Bearer $OPENAI_API_KEY"' : "";
    return `curl -N ${quoted(server + pathOf(body))} \\\n  -H 'Content-Type: application/json'${key} \\\n  -d ${quoted(JSON.stringify(body, null, 1))}`;
  }

  // The tokens of a chunk's choice, with their log-probabilities where there are any.
  function tokensOf(choice) {
    const logprobs = choice.logprobs;
    if (!logprobs) return [];
    if (logprobs.content) return logprobs.content.map((each) => ({
      text: each.token, logprob: each.logprob, top: (each.top_logprobs || []).map((top) => [top.token, top.logprob]) }));
    return (logprobs.tokens || []).map((text, i) => ({
      text, logprob: logprobs.token_logprobs[i], top: Object.entries((logprobs.top_logprobs || [])[i] || {}) }));
  }

  // What a run shows. A frame is what is known behind a step: `cells`, by position in the reply, each null where masked,
  // else { text, nfe: forwards when it was unmasked, logprob }; and the numbers so far. It comes of a canvas, or of the
  // tokens of a finished block and the canvas behind it. `steps` has what each frame's step did: positions unmasked, drafts
  // accepted, drafts wasted. `update` takes the events that the run got meanwhile, and none twice.
  function film(run) {
    const first = { ms: 0, nfe: 0, proposed: 0, accepted: 0, cells: [] };
    const all = { frames: [first], steps: [], starts: [], emitted: [], text: "", finish: null, usage: null, numbers: null, ms: 0, isOpen: true };
    let open = null;  // a frame that has no numbers yet
    let taken = 0;

    const countKnown = (frame) => frame.cells.filter((cell) => cell !== null).length;
    const begin = (ms) => {
      const last = all.frames[all.frames.length - 1];
      open = open || { ms, nfe: null, proposed: last.proposed, accepted: last.accepted, cells: last.cells.slice() };
    };
    const close = (numbers) => {
      const last = all.frames[all.frames.length - 1];
      if (!open) return;
      const { nfe = last.nfe + 1, proposed = last.proposed, accepted = last.accepted } = numbers || {};
      open.cells = open.cells.map((cell) => cell && cell.nfe === null ? { ...cell, nfe } : cell);
      all.steps.push({
        nfe, forwards: Math.max(1, nfe - last.nfe), unmasked: Math.max(0, countKnown(open) - countKnown(last)),
        accepted: accepted - last.accepted, wasted: proposed - last.proposed - (accepted - last.accepted),
      });
      all.frames.push({ ...open, nfe, proposed, accepted });
      open = null;
    };
    const put = (place, text, logprob) => {
      while (open.cells.length < place) open.cells.push(null);
      const old = open.cells[place];
      open.cells[place] = text === null ? null : old && old.text === text ? { ...old, logprob: logprob === undefined ? old.logprob : logprob } : { text, nfe: null, logprob };
    };

    const take = ([ms, chunk]) => {
      if (chunk.usage) all.usage = chunk.usage;
      const canvas = chunk.dllm_canvas;
      if (canvas) {
        begin(ms);
        if (!all.starts.includes(canvas.start)) all.starts.push(canvas.start);
        canvas.tokens.forEach((text, i) => put(canvas.start + i, text, canvas.logprobs ? canvas.logprobs[i] : undefined));
        close(canvas);
      }
      for (const choice of chunk.choices || []) {
        all.text += (choice.delta ? choice.delta.content : choice.text) || "";
        const tokens = tokensOf(choice);
        if (tokens.length) {
          begin(ms);
          const from = all.emitted.length;
          tokens.forEach((token, i) => put(from + i, token.text, token.logprob));
          all.emitted.push(...tokens);
          all.ms = ms;
        }
        if (choice.finish_reason) {
          begin(ms);
          all.finish = choice.finish_reason;
          all.numbers = (chunk.kv_transfer_params || {}).dllm || null;
          while (open.cells.length > all.emitted.length && open.cells[open.cells.length - 1] === null) open.cells.pop();
          all.ms = ms;
          const last = all.frames[all.frames.length - 1];
          const isSame = all.numbers && all.numbers.nfe === last.nfe && JSON.stringify(open.cells) === JSON.stringify(last.cells);
          if (isSame) open = null;
          else close(all.numbers);
        }
      }
    };
    all.update = () => {
      while (taken < run.events.length) take(run.events[taken++]);
      all.isOpen = all.finish === null;
    };
    all.update();
    return all;
  }

  // The confidence with which a cell was unmasked, null where it is not known (yet).
  function confidence(shown, place, cell) {
    if (typeof cell.logprob === "number") return Math.exp(cell.logprob);
    const token = shown.emitted[place];
    return token && token.text === cell.text && typeof token.logprob === "number" ? Math.exp(token.logprob) : null;
  }

  const BINS = [0.5, 0.8, 0.95, 0.99];
  const bin = (p) => BINS.filter((bound) => p >= bound).length;
  const LABELS = ["below 50 %", "50 to 80 %", "80 to 95 %", "95 to 99 %", "99 % and more"];
  const percent = (p) => (p > 0.9995 ? "> 99.9 %" : p < 0.0005 ? "< 0.1 %" : (100 * p).toFixed(1) + " %");

  // A token's text as a cell shows it, and whether it ends or pads the reply.
  function shownText(text) {
    if (/^<.*(end|eos|eot|pad).*>$|^<\/s>$/i.test(text)) return { text: "∎", isEnd: true };
    return { text: text.replace(/\n/g, "⏎").replace(/\t/g, "⇥").replace(/^ +$/, (spaces) => "␣".repeat(spaces.length)), isEnd: false };
  }

  // The last frame at a place of the axis "nfe" or "ms".
  function frameAt(shown, axis, place) {
    let found = shown.frames[0];
    for (const frame of shown.frames) if (frame[axis] <= place) found = frame;
    return found;
  }

  // The numbers of a run behind a frame; of the whole run where it is its last one.
  function numbersAt(shown, frame) {
    const isLast = !shown.isOpen && frame === shown.frames[shown.frames.length - 1];
    const known = frame.cells.filter((cell) => cell !== null && !shownText(cell.text).isEnd).length;
    const tokens = isLast && shown.usage ? shown.usage.completion_tokens : known;
    const ms = isLast ? shown.ms : frame.ms;
    return { nfe: frame.nfe, tokens, seconds: ms / 1000, speed: ms > 0 && tokens > 0 ? (1000 * tokens) / ms : null,
      proposed: frame.proposed, accepted: frame.accepted, wasted: frame.proposed - frame.accepted };
  }

  // Two runs that have ended, compared; null before.
  function compared(drafted, plain) {
    if (!drafted || !plain || drafted.isOpen || plain.isOpen) return null;
    const [a, b] = [drafted, plain].map((shown) => numbersAt(shown, shown.frames[shown.frames.length - 1]));
    return { forwards: [a.nfe, b.nfe], speed: a.speed / b.speed, isSame: drafted.text === plain.text };
  }

  // The page as a file that has a recording in it and asks nobody for anything.
  function embedded(source, recording) {
    const json = JSON.stringify({ recording }).replace(/</g, "\\u003c");
    return source.replace(/(http-equiv="Content-Security-Policy" content="[^"]*); connect-src [^;"]*/, "$1")
      .replace(/(<script type="application\/json" id="given">)[^<]*(<\/script>)/, (all, begin, end) => begin + json + end);
  }

  function recordingOf(runs, about) {
    return { version: VERSION, ...about, runs: runs.map(({ name, body, events }) => ({ name, body, events })) };
  }

  // Raises where a recording is another than this page shows.
  function checked(recording) {
    if (recording.version !== VERSION) throw new Error(`the recording is of version ${recording.version}, this page shows version ${VERSION}`);
    return recording;
  }

  return { eventParser, kept, requestBody, pathOf, curlOf, film, confidence, bin, LABELS, percent, shownText, frameAt, numbersAt,
    compared, embedded, recordingOf, checked };
})();
