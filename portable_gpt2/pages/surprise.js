
(() => {
  const data = JSON.parse(document.getElementById("data").textContent);
  const chosen = document.getElementById("chosen"), alternatives = document.getElementById("alternatives");

  document.querySelectorAll(".text").forEach((element, k) => {
    const { tokens } = chooser(element, (i) => {
      const text = data.texts[k], logProb = text.log_probs[i], name = make("code", "chosen", nameOf(tokens[i]));
      alternatives.replaceChildren();
      if (logProb === null) {
        chosen.replaceChildren(name, make("span", "", " has no probability, because no token comes before it"));
        return;
      }
      const facts = [percent(Math.exp(logProb)), (-logProb / Math.LN2).toFixed(2) + " bits"];
      if (text.ranks) facts.push("rank " + text.ranks[i]);
      chosen.replaceChildren(name, make("span", "", " " + facts.join(", ")));
      if (!text.ranks) return;
      alternatives.replaceChildren(...text.likeliest[i].map((token, j) => {
        const item = make("li", token === text.tokens[i] ? "same" : "", "");
        item.append(make("code", "", data.names[token]),
          make("span", "muted", " " + percent(Math.exp(text.likeliest_log_probs[i][j] / 1000))));
        return item;
      }));
    });
  });
})();
