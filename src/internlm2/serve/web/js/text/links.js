// Which addresses may be followed, and which pictures may be shown.

const LINK_SCHEMES = new Set(["http:", "https:", "mailto:"]);
const PICTURE = /^data:image\/(?:png|jpeg|gif|webp);base64,[A-Za-z0-9+/]+={0,2}$/;
// The server's own files: a path without a scheme, a host, dots that climb, or characters that browsers skip.
const OWN_PATH = /^\/?(?!\/)(?:[\w~%-][\w.~%-]*\/)*[\w~%-][\w.~%-]*$/;

/** The address, when it is an absolute one of a harmless scheme; else null. */
export function safeLink(address) {
  const text = String(address);
  // Browsers leave out tabs, line breaks and leading control characters before they read the scheme.
  if (/[\u0000-\u0020\u007f-\u009f\u2028\u2029\\]/.test(text)) return null;
  let url;
  try {
    url = new URL(text);
  } catch {
    return null;
  }
  if (!LINK_SCHEMES.has(url.protocol)) return null;
  return url.username || url.password ? null : text;
}

/** The address of a picture that is in the text itself or lies on this server; else null. */
export function safePicture(address) {
  const text = String(address).replace(/^(data:[^,]*,)\s+/, "$1");
  if (PICTURE.test(text) || OWN_PATH.test(text)) return text;
  return null;
}
