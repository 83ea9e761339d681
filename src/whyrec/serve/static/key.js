/* The dialog that asks for the server's API key. */

import { onKeyNeeded } from "./api.js";
import { byId, say } from "./elements.js";

/** Lets requests that are refused for want of a key ask for it; all of them wait for one answer. */
export function startKeyDialog() {
  const dialog = byId("key-dialog");
  const input = byId("key");
  let waiting = null;

  onKeyNeeded((wasRefused) => {
    waiting ??= new Promise((resolve) => {
      say(byId("key-error"), wasRefused ? "The server refuses this key." : null);
      input.value = "";
      dialog.returnValue = "";
      dialog.showModal();
      dialog.addEventListener(
        "close",
        () => {
          waiting = null;
          resolve(dialog.returnValue === "given" ? input.value.trim() : null);
        },
        { once: true },
      );
    });
    return waiting;
  });
  byId("key-form").addEventListener("submit", (event) => {
    event.preventDefault();
    dialog.close("given");
  });
  byId("key-cancel").addEventListener("click", () => dialog.close(""));
}
