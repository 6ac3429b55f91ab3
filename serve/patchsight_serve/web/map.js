// The gallery as a map: what is alike lies together.

import { $ } from "./elements.js";

export async function openMap() {
  $("map").replaceChildren("map");
}
