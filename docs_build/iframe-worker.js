// The search runs in a worker, which browsers refuse to a page that was opened from disk. There, this
// runs the worker's script in a hidden frame. (material's own shim would be loaded from a network.)
if (location.protocol === "file:") {
  window.Worker = class extends EventTarget {
    constructor(url) {
      super();
      const frame = document.createElement("iframe");
      frame.hidden = true;
      frame.title = "search";
      document.body.append(frame);
      const inner = frame.contentWindow;
      const run = (source) =>
        new Promise((loaded, failed) => {
          const script = inner.document.createElement("script");
          script.src = source;
          script.onload = loaded;
          script.onerror = failed;
          inner.document.body.append(script);
        });
      inner.postMessage = (data) => this.dispatchEvent(new MessageEvent("message", { data }));
      inner.importScripts = (...sources) => Promise.all(sources.map(run));
      this.inner = inner;
      this.ready = run(url);
    }

    postMessage(data) {
      this.ready.then(() => this.inner.dispatchEvent(new MessageEvent("message", { data })));
    }
  };
}
