// Keeps a page current: fills the parts that the server says have changed.
"use strict";

(() => {
  const address = document.body.dataset.live;
  if (!address) return;
  const connection = document.getElementById("connection");

  const say = (text, state) => {
    connection.textContent = text;
    connection.dataset.state = state;
  };

  const fill = ({ id, html }) => {
    const element = document.getElementById(id);
    // What somebody is typing into or reading with the keyboard stays until they leave it.
    const active = document.activeElement;
    if (!element || (active !== document.body && element.contains(active))) return;
    const scrolled = [...element.querySelectorAll(".scroll")].map((box) => box.scrollLeft);
    element.innerHTML = html;
    element.querySelectorAll(".scroll").forEach((box, index) => {
      box.scrollLeft = scrolled[index] ?? 0;
    });
    document.dispatchEvent(new CustomEvent("river:part", { detail: { id } }));
  };

  const stream = new EventSource(address);
  stream.addEventListener("open", () => say("live", "good"));
  stream.addEventListener("error", () => say("reconnecting…", "fair"));
  stream.addEventListener("part", (event) => fill(JSON.parse(event.data)));
  stream.addEventListener("signed_out", () => location.reload());
  addEventListener("pagehide", () => stream.close());
})();
