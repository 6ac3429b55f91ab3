// Asking before something is gone for good.

import { $ } from "./elements.js";

/** Whether the person means it. typed: a text to be typed first; without one the button is ready at once. */
export function confirmed(title, text, button, typed = "") {
  const [dialog, input, ok] = ["confirm", "confirm-typed", "confirm-ok"].map($);
  $("confirm-title").textContent = title;
  $("confirm-text").textContent = text;
  input.parentElement.hidden = !typed;
  input.value = "";
  ok.textContent = button;
  ok.disabled = Boolean(typed);
  input.oninput = () => (ok.disabled = input.value !== typed);
  dialog.returnValue = "";
  dialog.showModal();
  return new Promise((done) => {
    dialog.onclose = () => done(dialog.returnValue === "ok");
    dialog.querySelector("form").onsubmit = (event) => {
      event.preventDefault(); // the page's policy lets no form go anywhere, not even into its dialog
      if (!ok.disabled) dialog.close("ok");
    };
    $("confirm-cancel").onclick = () => dialog.close("");
  });
}
