// What a hand does to a map: wheel, drag, pinch, click, keys.

export const STEP = 1.5; // of a zoom by key or button
const PAN = 80; // pixels, by key
const STILL = 5; // pixels that a click may move

/** Have a canvas follow the hand. told: `moved()`, `pointedAt(x, y)`, `left()`, `opened(x, y)`, `keyed()`, `openedByKey()`. */
export function listen(canvas, viewport, told) {
  const pointers = new Map(); // those that are down, and where
  let traveled = 0;
  const at = ({ clientX, clientY }) => {
    const { left, top } = canvas.getBoundingClientRect();
    return [clientX - left, clientY - top];
  };

  canvas.addEventListener("wheel", (event) => {
    const pixels = event.deltaY * (event.deltaMode ? 33 : 1);
    if (!viewport.zoomBy(Math.exp(-0.002 * Math.max(-300, Math.min(pixels, 300))), ...at(event))) return;
    event.preventDefault(); // at the end of the range the page scrolls on
    told.moved();
  }, { passive: false });

  canvas.addEventListener("pointerdown", (event) => {
    if (event.button) return;
    canvas.setPointerCapture(event.pointerId);
    pointers.set(event.pointerId, at(event));
    traveled = pointers.size > 1 ? Infinity : 0;
  });

  canvas.addEventListener("pointermove", (event) => {
    const now = at(event);
    const before = pointers.get(event.pointerId);
    if (!before) return told.pointedAt(...now);
    const other = [...pointers].find(([id]) => id !== event.pointerId)?.[1];
    pointers.set(event.pointerId, now);
    traveled += Math.hypot(now[0] - before[0], now[1] - before[1]);
    if (other) {
      const apart = (point) => Math.hypot(point[0] - other[0], point[1] - other[1]) || 1;
      viewport.zoomBy(apart(now) / apart(before), (now[0] + other[0]) / 2, (now[1] + other[1]) / 2);
    }
    if (traveled < STILL) return undefined;
    const share = other ? 0.5 : 1; // of two fingers each carries half
    viewport.panBy(share * (now[0] - before[0]), share * (now[1] - before[1]));
    return told.moved();
  });

  const up = (event) => {
    const known = pointers.delete(event.pointerId);
    if (known && event.type === "pointerup" && traveled < STILL) told.opened(...at(event));
  };
  canvas.addEventListener("pointerup", up);
  canvas.addEventListener("pointercancel", up);
  canvas.addEventListener("pointerleave", () => told.left());

  const keys = {
    "+": () => viewport.zoomBy(STEP),
    "=": () => viewport.zoomBy(STEP),
    "-": () => viewport.zoomBy(1 / STEP),
    0: () => viewport.whole(),
    ArrowLeft: () => viewport.panBy(PAN, 0),
    ArrowRight: () => viewport.panBy(-PAN, 0),
    ArrowUp: () => viewport.panBy(0, PAN),
    ArrowDown: () => viewport.panBy(0, -PAN),
  };
  canvas.addEventListener("keydown", (event) => {
    if (event.ctrlKey || event.metaKey || event.altKey) return;
    if (event.key === "Enter") return told.openedByKey();
    if (!keys[event.key]) return;
    event.preventDefault();
    keys[event.key]();
    told.moved();
    told.keyed();
  });
  canvas.addEventListener("focus", () => canvas.matches(":focus-visible") && told.keyed());
  canvas.addEventListener("blur", () => told.left());
}
