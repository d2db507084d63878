// Before the first paint: the colours that the reader chose.
try {
  const chosen = localStorage.getItem("internlm2-colours");
  if (chosen === "light" || chosen === "dark") document.documentElement.dataset.colours = chosen;
} catch {
  // forbidden by the browser: the system's colours
}
