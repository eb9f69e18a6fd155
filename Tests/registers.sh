#!/bin/sh
# registers.sh LIBRARY...: the sums of the tile kernels stay in registers. Swift may keep an array of sums in memory after a
# change anywhere in the module: results are the same then, and everything takes twice as long, which no other test sees.
# Up to 7 vectors on the stack of a large tile pass: they are constants, or what a loop begins with.
code=0
for library; do
  objdump -d --no-show-raw-insn "$library" | awk -v library="$library" '
    /^[0-9a-f]+ <.*>:$/ { name = $2 }
    name !~ /(Product|Outer|Broadcast|Adding|Dot)Tile.*run/ { next }
    /vfmadd/ { products[name]++ }
    /vmov[au]p[sd] +%[xyz]mm[0-9]+,(-?0x[0-9a-f]+)?\(%r[sb]p/ { stores[name]++ }
    END {
      for (name in products) {
        kernels++
        some = stores[name]
        if (some > products[name] / 3 || (some > 7 && some > products[name] / 10)) {
          print library ": " name " stores " some " vectors on the stack"
          bad++
        }
      }
      print library ": " kernels " kernels, " bad + 0 " with sums in memory"
      exit !kernels || bad
    }' || code=1
done
exit $code
