// A picture from the camera, where there is one and the browser lets a page use it.

import { take } from "./bring.js";
import { $ } from "./elements.js";
import { tell } from "./messages.js";

const QUALITY = 0.92; // of the JPEG
const REFUSED = "The browser does not let this page use it. Allow the camera for this address, and try again.";

let stream = null;

async function offer() {
  const devices = (await navigator.mediaDevices?.enumerateDevices().catch(() => [])) ?? []; // undefined without HTTPS
  $("camera").hidden = !devices.some(({ kind }) => kind === "videoinput");
}

async function open() {
  try {
    stream = await navigator.mediaDevices.getUserMedia({ video: { facingMode: "environment" }, audio: false });
  } catch (error) {
    tell("There is no picture from the camera.", error.name === "NotAllowedError" ? REFUSED : error.message, open);
    return;
  }
  $("camera-live").srcObject = stream;
  $("camera-dialog").showModal();
  await $("camera-live").play().catch(() => null); // closed before the first picture came
}

/** Whichever way the dialog was closed: the camera's light goes out. */
function stop() {
  stream?.getTracks().forEach((track) => track.stop());
  stream = $("camera-live").srcObject = null;
}

async function shoot() {
  const live = $("camera-live");
  if (!live.videoWidth) return; // no picture has come yet
  const canvas = Object.assign(document.createElement("canvas"), { width: live.videoWidth, height: live.videoHeight });
  canvas.getContext("2d").drawImage(live, 0, 0);
  const blob = await new Promise((done) => canvas.toBlob(done, "image/jpeg", QUALITY));
  $("camera-dialog").close();
  const time = new Date().toTimeString().slice(0, 8).replaceAll(":", ".");
  take([new File([blob], `camera ${time}.jpg`, { type: blob.type })]);
}

$("camera").addEventListener("click", open);
$("camera-take").addEventListener("click", shoot);
$("camera-cancel").addEventListener("click", () => $("camera-dialog").close());
$("camera-dialog").addEventListener("close", stop);
navigator.mediaDevices?.addEventListener("devicechange", offer);
offer();
