// Search runs in a Worker, which browsers refuse to a page that is read from disk: there a hidden
// frame takes its place. Only what the theme's search uses is here.
if (location.protocol === "file:") {
  window.Worker = class extends EventTarget {
    constructor(url) {
      super()
      const frame = document.createElement("iframe")
      frame.hidden = true
      document.body.appendChild(frame)
      this.inside = frame.contentWindow
      this.inside.postMessage = data => this.dispatchEvent(new MessageEvent("message", { data }))
      const script = frame.contentDocument.createElement("script")
      script.src = url
      this.loaded = new Promise((done, failed) => {
        script.onload = done
        script.onerror = () => failed(new Error(`${url} can't be read`))
      })
      frame.contentDocument.body.appendChild(script)
    }

    async postMessage(data) {
      await this.loaded
      this.inside.dispatchEvent(new MessageEvent("message", { data }))
    }
  }
}
