// swift-tools-version: 6.1
import Foundation
import PackageDescription

// The Makefile names the CPU level; "haswell" (x86-64-v3) is the base that every build must run on.
let cpu = Context.environment["FASTERMOE_CPU"] ?? "haswell"
let wide = cpu == "skylake-avx512"
#if arch(x86_64)
  let level = ["-Xcc", "-march=\(cpu)", "-target-cpu", cpu]
#else
  let level: [String] = []
#endif
// The tile kernels are loops over constant counts; they only become registers when all of them are unrolled.
let core: [SwiftSetting] =
  [.unsafeFlags(level + ["-Xllvm", "-unroll-threshold=3000"])]
  + (wide ? [.define("WIDE_VECTORS")] : [])

let package = Package(
  name: "FasterMoE",
  products: [.library(name: "fastermoe", type: .dynamic, targets: ["CAPI"])],
  targets: [
    .systemLibrary(name: "CFasterMoE", path: "include"),
    .systemLibrary(name: "CHwloc", pkgConfig: "hwloc", providers: [.apt(["libhwloc-dev"])]),
    .systemLibrary(name: "CHints"),
    .target(name: "FasterMoE", dependencies: ["CHints", "CHwloc"], swiftSettings: core),
    .target(
      name: "CAPI", dependencies: ["FasterMoE", "CFasterMoE"], exclude: ["exports.map"], swiftSettings: core,
      linkerSettings: [
        .unsafeFlags([
          "-static-stdlib", "-Xlinker", "--version-script=\(Context.packageDirectory)/Sources/CAPI/exports.map",
          "-Xlinker", "--gc-sections", "-Xlinker", "-soname=libfastermoe.so.0", "-Xlinker", "-z", "-Xlinker",
          "nodelete", "-l_FoundationCShims", "-l_FoundationCollections", "-lswiftSynchronization",
        ])
      ]),
    .testTarget(name: "FasterMoETests", dependencies: ["FasterMoE"], swiftSettings: core),
  ]
)
