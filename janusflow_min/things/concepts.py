# SPDX-License-Identifier: MIT
"""The things of this world: a noun, for some a colour, and the name of the emoji that shows it in both styles.

First come the nouns of GenEval's 80 that have an emoji, under GenEval's words; the emoji's names are Unicode's
(CLDR), as the packages spell them. A noun that exists in several colours is one thing in each. Left out: what cannot be
told apart at 48 px (clocks, moons, faces), what a VAE blurs away, and nouns of the world of shapes.
"""

from __future__ import annotations

STYLES = ("noto", "fluent")
Kind = tuple[str | None, str]  # (colour where the noun exists in several, noun)

_GENEVAL = """
person; bicycle; red car: automobile; motorcycle; airplane; bus; train; truck: delivery-truck; boat:
sailboat; traffic light: vertical-traffic-light; stop sign; bird; orange cat: cat; dog; horse; sheep: ewe;
cow; elephant; bear; zebra; giraffe; backpack; umbrella; handbag; tie: necktie; suitcase: luggage; frisbee:
flying-disc; skis; sports ball: soccer-ball; kite; skateboard; tennis racket: tennis; bottle:
bottle-with-popping-cork; wine glass; cup: hot-beverage; knife: kitchen-knife; spoon; bowl: bowl-with-spoon;
banana; red apple; sandwich; orange: tangerine; broccoli; carrot; hot dog; pizza; donut: doughnut; cake:
birthday-cake; chair; couch: couch-and-lamp; potted plant; bed; toilet; tv: television; laptop; computer
mouse; computer keyboard: keyboard; cell phone: mobile-phone; red book: closed-book; clock:
mantelpiece-clock; vase: amphora; scissors; teddy bear; toothbrush
"""
_COLOURED = """
blue car: sport-utility-vehicle; black cat: black-cat; green apple; blue book; green book; orange book; red
mushroom: mushroom; brown mushroom; red heart; orange heart; yellow heart; green heart; blue heart; purple
heart; pink heart; brown heart; black heart; grey heart
"""
_OTHERS = """
ant; bat; beetle; bee: honeybee; butterfly; camel; crab; crocodile; deer; dolphin; duck; eagle; fish;
flamingo; fox; frog; goat; gorilla; hedgehog; jellyfish; kangaroo; koala; ladybug: lady-beetle; leopard;
lion; lizard; lobster; mammoth; monkey; octopus; owl; panda; parrot; peacock; penguin; pig; rabbit; rhino:
rhinoceros; rooster; scorpion; shark; shrimp; sloth; snail; snake; spider; squid; tiger; tropical fish;
turkey; turtle; unicorn; whale; wolf; dinosaur: t-rex; dragon; cactus; cherry blossom; tree: deciduous-tree;
pine tree: evergreen-tree; palm tree; maple leaf; rose; sunflower; tulip; clover: four-leaf-clover;
hibiscus; avocado; bell pepper; bread; burger: hamburger; cheese: cheese-wedge; coconut; cookie; corn:
ear-of-corn; croissant; cupcake; egg; eggplant; ice cream: soft-ice-cream; kiwi: kiwi-fruit; lemon;
lollipop; peach; pear; pineapple; pretzel; strawberry; taco; teapot; tomato; waffle; watermelon; beer mug;
honey pot; chili pepper: hot-pepper; chocolate bar; onion; candy; custard; ambulance; fire truck:
fire-engine; police car; taxi; tractor; helicopter; rocket; ship; scooter: motor-scooter; sled; roller
skate; flying saucer; locomotive; racing car; castle; church; house; tent; fountain; volcano; mountain:
snow-capped-mountain; island: desert-island; hut; carousel horse; sun; moon: crescent-moon; cloud; rainbow;
snowflake; snowman: snowman-without-snow; lightning bolt: high-voltage; fire; planet: ringed-planet; globe:
globe-showing-americas; droplet; wave: water-wave; alarm clock; anchor; axe; balloon; basket; bathtub;
battery; bell; bomb; briefcase; broom; bucket; camera; candle; coin; crown; die: game-die; door; dress;
envelope; fire extinguisher; flashlight; floppy disk; gear; gem: gem-stone; gift: wrapped-gift; guitar;
hammer; hourglass: hourglass-done; joystick; key; ladder; lantern: red-paper-lantern; light bulb; lipstick;
lock: locked; magnet; magnifying glass: magnifying-glass-tilted-left; megaphone; microphone; microscope;
mirror; money bag; box: package; paintbrush; pencil; piano: musical-keyboard; pill; pumpkin: jack-o-lantern;
puzzle piece; radio; robot; ghost; skull; saxophone; screwdriver; scroll; shield; shopping cart; sponge;
sunglasses; dagger; syringe; telephone; telescope; toolbox; top hat; trophy; trumpet; violin; watch; wheel;
wrench; yarn; basketball; football: american-football; boxing glove; bow: ribbon; ice skate; high heel:
high-heeled-shoe; boot: hiking-boot; cap: billed-cap; target: bullseye; palette: artist-palette; gas pump:
fuel-pump; barrel: oil-drum; rock; log: wood; satellite; compass; buoy: ring-buoy; mailbox: postbox; game
controller: video-game; abacus; accordion; crystal ball; christmas tree; paddle: ping-pong; plunger; chess
pawn; alien; pushpin; tuba: postal-horn; flute; maracas
"""
_COLOUR_WORDS = ("red", "orange", "yellow", "green", "blue", "purple", "pink", "brown", "black", "grey")


def _read(text: str) -> dict[Kind, str]:
    """ "red car: automobile; cow" -> {("red", "car"): "automobile", (None, "cow"): "cow"}."""
    found: dict[Kind, str] = {}
    for entry in " ".join(text.split()).split("; "):
        words, _, icon = entry.strip(" ;").partition(": ")
        colour, _, noun = words.partition(" ")
        kind = (colour, noun) if noun and colour in _COLOUR_WORDS else (None, words)
        found[kind] = icon or words.replace(" ", "-")
    return found


GENEVAL = _read(_GENEVAL)
ICONS = GENEVAL | _read(_COLOURED) | _read(_OTHERS)  # kind -> name in the packages
