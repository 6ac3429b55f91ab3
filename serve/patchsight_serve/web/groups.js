// The gallery in groups: near-duplicates, and clusters with their most typical pictures.

import { $ } from "./elements.js";

export async function openGroups() {
  $("groups").replaceChildren("groups");
}
