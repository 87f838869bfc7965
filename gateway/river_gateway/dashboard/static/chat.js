// Two models, one prompt: both answers stream beside each other, and each side keeps its own conversation.
"use strict";

(() => {
  const form = document.getElementById("ask");
  if (!form) return;
  const { prompt, send, stop, anew, max_tokens, temperature, csrf_token } = form.elements;
  const sides = [...document.querySelectorAll("[data-model]")].map((section) => ({
    model: section.dataset.model,
    log: section.querySelector(".talk"),
    facts: section.querySelector(".facts"),
    messages: [],
  }));
  let asking = null;

  const show = (side, role, text) => {
    const said = document.createElement("p");
    said.className = `said ${role}`;
    said.textContent = text;
    side.log.append(said);
    side.log.scrollTop = side.log.scrollHeight;
    return said;
  };

  // The data of server-sent events, which end with an empty line.
  async function* events(body) {
    const reader = body.pipeThrough(new TextDecoderStream()).getReader();
    let rest = "";
    for (;;) {
      const { done, value } = await reader.read();
      if (done) return;
      const parts = (rest + value).split("\n\n");
      rest = parts.pop();
      for (const part of parts) {
        if (!part.startsWith("data:")) continue;
        const data = part.slice("data:".length).trim();
        if (data === "[DONE]") return;
        yield JSON.parse(data);
      }
    }
  }

  const request = async (side, signal) => {
    const answer = await fetch(form.action, {
      method: "POST",
      redirect: "manual",
      signal,
      headers: { "content-type": "application/json", "x-csrf-token": csrf_token.value },
      body: JSON.stringify({
        model: side.model,
        messages: side.messages,
        max_tokens: Number(max_tokens.value),
        temperature: Number(temperature.value),
        stream: true,
        stream_options: { include_usage: true },
      }),
    });
    if (answer.ok) return answer;
    if (answer.type === "opaqueredirect") location.reload(); // The key has ended.
    const json = answer.headers.get("content-type")?.startsWith("application/json");
    throw new Error(json ? (await answer.json()).error.message : "The page is out of date: reload it.");
  };

  const words = ({ usage, version, firstMs, lastMs }) => {
    const facts = [];
    if (firstMs !== null) facts.push(`first token after ${Math.round(firstMs)} ms`);
    if (usage) {
      const cached = usage.prompt_tokens_details?.cached_tokens;
      facts.push(`${usage.prompt_tokens} prompt tokens${cached ? ` (${cached} cached)` : ""}`);
      facts.push(`${usage.completion_tokens} answer tokens`);
      const passed = (lastMs - firstMs) / 1000;
      if (usage.completion_tokens > 1 && passed > 0) facts.push(`${((usage.completion_tokens - 1) / passed).toPrecision(3)} tokens/s`);
    }
    if (version) facts.push(version);
    return facts.join(" · ");
  };

  const answer = async (side, text, signal) => {
    side.messages.push({ role: "user", content: text });
    show(side, "user", text);
    const said = show(side, "assistant", "");
    const found = { usage: null, version: null, firstMs: null, lastMs: null };
    const begun = performance.now();
    side.facts.textContent = "Asking…";
    side.log.setAttribute("aria-busy", "true");
    let problem = null;
    try {
      const response = await request(side, signal);
      found.version = response.headers.get("x-river-policy-version");
      for await (const event of events(response.body)) {
        if (event.error) throw new Error(event.error.message);
        found.usage = event.usage ?? found.usage;
        const piece = event.choices?.[0]?.delta?.content;
        if (!piece) continue;
        found.lastMs = performance.now() - begun;
        found.firstMs ??= found.lastMs;
        const atEnd = side.log.scrollTop + side.log.clientHeight >= side.log.scrollHeight - 8;
        said.textContent += piece;
        if (atEnd) side.log.scrollTop = side.log.scrollHeight;
      }
    } catch (error) {
      problem = error.name === "AbortError" ? "Stopped; what was produced until then is billed." : error.message;
    }
    if (said.textContent) side.messages.push({ role: "assistant", content: said.textContent });
    else side.messages.pop(); // Unanswered, the question is no part of the conversation.
    if (problem) show(side, "problem", problem);
    if (!said.textContent) said.remove();
    side.facts.textContent = words(found) || (problem ? "No answer." : "An empty answer.");
    side.log.removeAttribute("aria-busy");
  };

  const ask = async () => {
    const text = prompt.value;
    if (asking || !form.reportValidity()) return;
    asking = new AbortController();
    prompt.value = "";
    prompt.focus(); // Its button is about to go.
    send.hidden = anew.disabled = true;
    stop.hidden = false;
    await Promise.all(sides.map((side) => answer(side, text, asking.signal)));
    asking = null;
    if (document.activeElement === stop) prompt.focus();
    send.hidden = anew.disabled = false;
    stop.hidden = true;
  };

  const forget = () => {
    for (const side of sides) {
      side.messages = [];
      side.log.replaceChildren();
      side.facts.textContent = "Nothing has been asked yet.";
    }
    prompt.focus();
  };

  form.addEventListener("submit", (event) => {
    event.preventDefault();
    ask();
  });
  prompt.addEventListener("keydown", (event) => {
    if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
    event.preventDefault();
    ask();
  });
  addEventListener("keydown", (event) => {
    if (event.key === "Escape") asking?.abort();
  });
  stop.addEventListener("click", () => asking?.abort());
  anew.addEventListener("click", forget);
})();
