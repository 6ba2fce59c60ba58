import { defineConfig } from "vitest/config";

// The page may lie under any path. Nothing is inlined: each file is checked by its own hash.
export default defineConfig({
  base: "./",
  publicDir: false,
  build: {
    outDir: "../src/cipherlm/serving/static",
    emptyOutDir: true,
    target: "es2022",
    assetsInlineLimit: 0,
    modulePreload: false,
    reportCompressedSize: false,
    chunkSizeWarningLimit: 1024,
  },
  worker: { format: "iife" },
  // Passphrases take time, and more on a machine that others use too.
  test: { testTimeout: 60_000 },
});
