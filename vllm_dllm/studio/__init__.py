"""A page that shows denoising: `page.html`, with a server's address in it or with a recording. No vLLM here."""
