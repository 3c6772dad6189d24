"use strict";
// Filters and sorts the queries, which are all there without it; the controls appear when it runs.
const list = document.getElementById("queries");
const cards = [...list.children];
const controls = document.getElementById("controls");
const search = controls.querySelector("input");
const order = controls.querySelector("select");
const buttons = [...controls.querySelectorAll("button")];
const count = document.getElementById("count");
const words = new Map(cards.map((card) => [card, card.dataset.words.toLocaleLowerCase()]));
let tag = "";

function filter() {
  const wanted = search.value.toLocaleLowerCase().split(/\s+/).filter(Boolean);
  let shown = 0;
  for (const card of cards) {
    const fits =
      (!tag || card.dataset.tags.split(" ").includes(tag)) && wanted.every((word) => words.get(card).includes(word));
    card.hidden = !fits;
    shown += fits;
  }
  count.textContent = `${shown} of ${cards.length} queries`;
}

function sort() {
  const key = order.value;
  cards.sort((one, other) =>
    key === "words"
      ? one.dataset.words.localeCompare(other.dataset.words)
      : one.dataset[key] - other.dataset[key] || one.dataset.words.localeCompare(other.dataset.words)
  );
  list.append(...cards);
}

search.addEventListener("input", filter);
order.addEventListener("change", sort);
for (const button of buttons) {
  button.addEventListener("click", () => {
    tag = button.dataset.tag;
    for (const other of buttons) other.setAttribute("aria-pressed", String(other === button));
    filter();
  });
}
controls.hidden = false;
// A browser that goes back to the page may have filled these in.
sort();
filter();
