// Say that a table or code scrolls sideways, where it does, and let the keyboard scroll it.
function markTables() {
  for (const box of document.querySelectorAll(".table-wrapper, .wide-figure, .scroll, pre")) {
    const scrolls = box.scrollWidth > box.clientWidth + 1;
    const before = box.previousElementSibling;
    const marked = before !== null && before.classList.contains("scroll-hint");
    box.classList.toggle("scrolls-sideways", scrolls);
    if (scrolls && !marked) {
      const hint = document.createElement("p");
      hint.className = "scroll-hint";
      hint.textContent = "↔ scrolls sideways";
      box.before(hint);
      box.tabIndex = 0;
    } else if (!scrolls && marked) {
      before.remove();
      box.removeAttribute("tabindex");
    }
  }
}
addEventListener("load", markTables);
addEventListener("resize", markTables);
