// The conversation and the field to write in. The page only draws and reports: every text in it was made safe in Python
// (items' html), or is put here as text. Traits: items, live, is_answering, can_attach, draft, seen.

const PATIENCE = 4000; // ms until a question without an echo means that the kernel is busy with a cell, or gone
const LARGEST_FILE = 20 * 2 ** 20;

function element(tag, options = {}, ...children) {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(options)) {
    if (name === "text") made.textContent = value;
    else if (name.startsWith("on")) made.addEventListener(name.slice(2), value);
    else if (value === true) made.setAttribute(name, "");
    else if (value !== false && value != null) made.setAttribute(name, value);
  }
  made.append(...children);
  return made;
}

const button = (text, label, onclick, more = {}) =>
  element("button", { type: "button", text, "aria-label": label, title: label, onclick, ...more });

async function copy(text, control) {
  try {
    await navigator.clipboard.writeText(text);
  } catch { // a frame without that permission
    const area = element("textarea", { class: "gqk-chat-hidden" });
    area.value = text;
    control.after(area);
    area.select();
    document.execCommand("copy");
    area.remove();
  }
  const before = control.textContent;
  control.textContent = "Copied";
  setTimeout(() => (control.textContent = before), 1200);
}

function addCopyButtons(box) {
  for (const code of box.querySelectorAll("pre > code")) {
    const control = button("Copy", "Copy this code", () => copy(code.textContent, control), { class: "gqk-chat-copy-code" });
    code.parentElement.prepend(control);
  }
}

function readFile(file) {
  return new Promise((resolve, reject) => {
    const reader = new FileReader();
    reader.onload = () => resolve({ name: file.name, type: file.type, data: String(reader.result).split(",")[1] });
    reader.onerror = () => reject(reader.error);
    reader.readAsDataURL(file);
  });
}

function render({ model, el }) {
  let files = [], number = model.get("seen"), waiting = null, editing = null;
  const unheard = () => notice("The kernel does not answer: another cell may be running, or it has stopped. If it has, " +
    "run the cells again; what is above can still be copied.");
  const send = content => {
    number += 1;
    clearTimeout(waiting);
    waiting = setTimeout(unheard, PATIENCE);
    try {
      model.send({ ...content, seq: number });
    } catch { // the page knows already that there is no kernel
      unheard();
    }
  };

  const transcript = element("div", { class: "gqk-chat-transcript", role: "log", "aria-label": "Conversation", tabindex: 0 });
  const warning = element("div", { class: "gqk-chat-notice", role: "status", "aria-live": "polite" });
  const previews = element("div", { class: "gqk-chat-files" });
  const box = element("textarea", { rows: 2, "aria-label": "Message", placeholder: "Type, then press Enter; Shift+Enter for a new line" });
  const sendButton = button("Send", "Send the message", () => ask(), { class: "gqk-chat-send" });
  const stopButton = button("Stop", "Stop the answer", () => send({ do: "stop" }), { class: "gqk-chat-stop" });
  const picker = element("input", { type: "file", multiple: true, accept: "image/*,audio/wav", class: "gqk-chat-hidden", tabindex: -1, "aria-hidden": "true" });
  const attach = button("Attach", "Attach an image or a sound", () => picker.click(), { class: "gqk-chat-attach" });
  const row = element("div", { class: "gqk-chat-row" }, box, element("div", { class: "gqk-chat-buttons" }, sendButton, stopButton, attach, picker));
  const root = element("div", { class: "gqk-chat-view" }, transcript, warning, previews, row);
  el.append(root);

  const notice = text => (warning.textContent = text);

  function ask() {
    if (model.get("is_answering") || !box.value.trim()) return;
    editing = null;
    const text = box.value;
    box.value = "";
    send({ do: "ask", text, files, instead_of: null });
    setFiles([]);
  }

  function setFiles(wanted) {
    files = wanted;
    previews.replaceChildren(...files.map((file, index) => element("span", { class: "gqk-chat-file" },
      ...(file.type.startsWith("image/") ? [element("img", { src: `data:${file.type};base64,${file.data}`, alt: file.name })] : []),
      file.name, button("×", `Remove ${file.name}`, () => setFiles(files.filter((_, i) => i !== index))))));
  }

  async function take(list) {
    if (!model.get("can_attach")) return notice("This model was loaded for text only: load it with text_only=False.");
    const small = [...list].filter(file => file.size <= LARGEST_FILE);
    if (small.length < list.length) notice("A file of more than 20 MiB was left out.");
    setFiles([...files, ...(await Promise.all(small.map(readFile)))]);
  }

  function turn(item) {
    const actions = element("span", { class: "gqk-chat-actions" });
    if (item.place.length > 1) {
      const at = item.place.indexOf(item.number), go = step => send({ do: "show", number: item.place[at + step] });
      actions.append(
        button("‹", "Previous version", () => go(-1), { disabled: at === 0 }),
        element("span", { text: `${at + 1} of ${item.place.length}` }),
        button("›", "Next version", () => go(1), { disabled: at === item.place.length - 1 }));
    }
    if (item.role === "user") actions.append(button("Edit", "Edit and ask again, in a branch of its own", () => edit(item, said)));
    else if (item.is_last) actions.append(button("Again", "Answer again", () => send({ do: "again" }), { class: "gqk-chat-again" }));
    const copier = button("Copy", "Copy this message", () => copy(item.text, copier));
    actions.append(copier);
    const said = element("div", { class: "gqk-said" });
    said.innerHTML = item.html;
    addCopyButtons(said);
    const head = element("header", {}, element("span", { class: "gqk-who", text: item.who }), actions);
    const made = element("article", { class: `gqk-turn gqk-turn-${item.role}`, "aria-label": item.who }, head);
    if (item.thoughts) made.append(thoughts(item.thoughts, false));
    made.append(said);
    if (item.note) made.append(element("footer", { text: item.note }));
    return made;
  }

  function thoughts(html, open) {
    const made = element("details", { open, "aria-label": "Thoughts" }, element("summary", { text: "Thoughts" }));
    const inner = element("div");
    inner.innerHTML = html;
    made.append(inner);
    return made;
  }

  function edit(item, said) {
    if (model.get("is_answering") || editing) return;
    editing = element("textarea", { rows: 3, "aria-label": "Edited message" });
    editing.value = item.text;
    const done = () => { editing = null; drawItems(); };
    const save = () => {
      const text = editing.value;
      done();
      if (text.trim()) send({ do: "ask", text, files: [], instead_of: item.number });
    };
    editing.addEventListener("keydown", event => {
      if (event.key === "Escape") done();
      if (event.key === "Enter" && !event.shiftKey && !event.isComposing) { event.preventDefault(); save(); }
    });
    said.replaceChildren(editing, element("div", {}, button("Ask", "Ask this instead", save), button("Cancel", "Leave it as it is", done)));
    editing.focus();
  }

  let drawn = new Map(), answer = null;
  const atEnd = () => transcript.scrollHeight - transcript.scrollTop - transcript.clientHeight < 40;

  function keepingPlace(draw) {
    const stays = atEnd();
    draw();
    if (stays) transcript.scrollTop = transcript.scrollHeight;
  }

  function drawItems() {
    if (editing) return;
    keepingPlace(() => {
      const next = new Map();
      for (const item of model.get("items")) {
        const key = JSON.stringify([item.number, item.place, item.is_last, item.html.length]);
        next.set(key, drawn.get(key) ?? turn(item));
      }
      drawn = next;
      transcript.replaceChildren(...drawn.values(), ...(answer ? [answer] : []));
    });
  }

  function drawLive() {
    const live = model.get("live");
    keepingPlace(() => {
      if (!live.who) {
        answer?.remove();
        answer = null;
        return;
      }
      if (!answer) {
        answer = element("article", { class: "gqk-turn gqk-turn-assistant gqk-chat-live", "aria-label": live.who, "aria-busy": "true" },
          element("header", {}, element("span", { class: "gqk-who", text: live.who })), element("div", { class: "gqk-chat-thinking" }),
          element("div", { class: "gqk-said" }));
        transcript.append(answer);
      }
      const [, thinking, said] = answer.children;
      const open = thinking.querySelector("details")?.open ?? false;
      thinking.replaceChildren(...(live.thoughts ? [thoughts(live.thoughts, open)] : []));
      said.innerHTML = live.html;
    });
  }

  function drawState() {
    const answering = model.get("is_answering");
    sendButton.disabled = answering;
    stopButton.disabled = !answering;
    attach.hidden = !model.get("can_attach");
    root.classList.toggle("gqk-chat-answering", answering);
  }

  const listeners = {
    "change:items": drawItems, "change:live": drawLive, "change:is_answering": drawState, "change:can_attach": drawState,
    "change:seen": () => { clearTimeout(waiting); notice(""); },
    "change:draft": () => { if (!box.value) box.value = model.get("draft").text ?? ""; },
  };
  for (const [name, listener] of Object.entries(listeners)) model.on(name, listener);
  box.addEventListener("keydown", event => {
    if (event.key === "Escape" && model.get("is_answering")) send({ do: "stop" });
    if (event.key === "Enter" && !event.shiftKey && !event.isComposing) { event.preventDefault(); ask(); }
  });
  root.addEventListener("keydown", event => event.stopPropagation()); // the notebook has shortcuts of its own
  root.addEventListener("dragover", event => { event.preventDefault(); root.classList.add("gqk-chat-drop"); });
  root.addEventListener("dragleave", () => root.classList.remove("gqk-chat-drop"));
  root.addEventListener("drop", event => {
    event.preventDefault();
    event.stopPropagation();
    root.classList.remove("gqk-chat-drop");
    take(event.dataTransfer.files);
  });
  box.addEventListener("paste", event => { if (event.clipboardData.files.length) take(event.clipboardData.files); });
  picker.addEventListener("change", () => { take(picker.files); picker.value = ""; });
  drawItems();
  drawLive();
  drawState();
  transcript.scrollTop = transcript.scrollHeight;
  return () => {
    clearTimeout(waiting);
    for (const [name, listener] of Object.entries(listeners)) model.off(name, listener);
  };
}

export default { render };
