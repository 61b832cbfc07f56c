"use strict";

/* Let the mouse, touch and the arrow keys choose a token of the text in an element; call show(index) for each choice. */
function chooser(element, show) {
  const tokens = Array.from(element.querySelectorAll(".t"));
  let current = 0, begun = false;
  tokens.forEach((token, i) => { token.number = i; });

  function choose(i, focus) {
    if (i < 0 || i >= tokens.length) return;
    if (i !== current || !begun) {
      tokens[current].setAttribute("tabindex", "-1"); /* without the attribute, it would lose the focus */
      tokens[current].removeAttribute("aria-current");
      [current, begun] = [i, true];
      tokens[i].setAttribute("tabindex", "0");
      tokens[i].setAttribute("aria-current", "true");
      show(i);
    }
    if (focus) tokens[i].focus();
  }

  function at(event) {
    const token = event.target.closest(".t");
    return token ? token.number : -1;
  }

  element.addEventListener("pointerover", (event) => choose(at(event), false));
  element.addEventListener("click", (event) => choose(at(event), true));
  element.addEventListener("focusin", (event) => choose(at(event), false));
  element.addEventListener("keydown", (event) => {
    if (event.altKey || event.ctrlKey || event.metaKey) return;
    const last = tokens.length - 1;
    const to = { ArrowLeft: current - 1, ArrowRight: current + 1, Home: 0, End: last }[event.key];
    if (to === undefined) return;
    event.preventDefault();
    choose(Math.min(Math.max(to, 0), last), true);
  });
  return { tokens, choose };
}

/* Return the text of a token with visible signs for spaces and line ends. */
function nameOf(token) {
  const text = token.textContent.replace(/↵\n/g, "↵").replace(/ /g, "␣").replace(/\t/g, "⇥");
  return text === "" ? "(empty)" : text;
}

/* Return a new element with a class and a text. */
function make(tag, kind, text) {
  const element = document.createElement(tag);
  element.className = kind;
  element.textContent = text;
  return element;
}

/* Return a probability as a text. */
function percent(p) {
  const x = 100 * p;
  if (x >= 99.95) return "100 %";
  if (x >= 9.95) return x.toFixed(0) + " %";
  if (x >= 0.095) return x.toFixed(1) + " %";
  return x === 0 ? "0 %" : "below 0.1 %";
}
