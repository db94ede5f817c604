"use strict";
(function () {
  var tools = document.getElementById("tools");
  var folds = Array.prototype.slice.call(document.querySelectorAll("details.class"));
  function open(wanted) { folds.forEach(function (fold) { fold.open = wanted; }); }
  function reveal() {
    var place = document.getElementById(location.hash.slice(1));
    for (var at = place; at; at = at.parentElement) { if (at.tagName === "DETAILS") { at.open = true; } }
    if (place) { place.scrollIntoView(); }
  }
  window.addEventListener("hashchange", reveal);
  if (location.hash) { reveal(); }
  window.addEventListener("beforeprint", function () {
    Array.prototype.forEach.call(document.querySelectorAll("details"), function (fold) { fold.open = true; });
  });
  if (!tools) { return; }
  tools.hidden = false;
  document.getElementById("open").addEventListener("click", function () { open(true); });
  document.getElementById("close").addEventListener("click", function () { open(false); });
  document.getElementById("filter").addEventListener("input", function (event) {
    var words = event.target.value.toLowerCase(), shown = 0;
    folds.forEach(function (fold) {
      fold.hidden = fold.querySelector("h3").textContent.toLowerCase().indexOf(words) < 0;
      shown += fold.hidden ? 0 : 1;
    });
    document.getElementById("shown").textContent = shown + " of " + folds.length + " shown";
  });
})();
